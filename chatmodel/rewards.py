"""How good is a completion, for reinforcement learning? Plain functions in TRL's form.

Each takes `completions` (texts, or lists of messages) and the data set's columns, one value per completion, and
returns one reward per completion.
"""

from collections.abc import Sequence
from typing import Any

from chatmodel.conversations.answers import ANSWER_PATTERN, extract_answer

Completion = str | list[dict[str, Any]]


def reward_answer(completions: Sequence[Completion], answer: Sequence[str], **columns: Any) -> list[float]:
    """1 where the first "#### n" is the answer column's number, else 0; for GSM8K, sums, and letter counting.

    Source: karpathy/nanochat tasks/gsm8k.py@c75fe54, `reward`.
    """
    return [
        float(extract_answer(_text(completion)) == str(expected).replace(",", ""))
        for completion, expected in zip(completions, answer, strict=True)
    ]


def reward_task(
    completions: Sequence[Completion], task: Sequence[str], answer: Sequence[str], **columns: Any
) -> list[float]:
    """What each row's task rewards: for SimpleSpelling, whose answer is the word, letters; else the answer."""
    return [
        (reward_spelling([text], [expected]) if name == "SimpleSpelling" else reward_answer([text], [expected]))[0]
        for text, name, expected in zip(completions, task, answer, strict=True)
    ]


def reward_form(completions: Sequence[Completion], **columns: Any) -> list[float]:
    """1 where a completion gives one "#### n" and ends with it, else 0; give it a small weight, it is easy to earn."""
    rewards = []
    for completion in completions:
        found = list(ANSWER_PATTERN.finditer(_text(completion)))
        rewards.append(float(len(found) == 1 and found[0].end() == len(_text(completion).rstrip())))
    return rewards


def reward_spelling(completions: Sequence[Completion], word: Sequence[str], **columns: Any) -> list[float]:
    """The share of letters in their place in "cat:c,a,t", of the longer of the word and what is spelled: 0 to 1."""
    rewards = []
    for completion, expected in zip(completions, word, strict=True):
        letters = _text(completion).rpartition(":")[2].strip().split(",")
        right = sum(letter == wanted for letter, wanted in zip(letters, expected, strict=False))
        rewards.append(right / max(len(letters), len(expected)))
    return rewards


def _text(completion: Completion) -> str:
    if isinstance(completion, str):
        return completion
    return "".join(message["content"] for message in completion if isinstance(message["content"], str))

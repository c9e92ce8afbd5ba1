"""Which multiple choice questions with letters can be made of conversations and of other multiple choice questions?"""

import random
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from chatmodel.conversations.datasets import LETTERS, ask_multiple_choice
from chatmodel.conversations.render import Messages
from chatmodel.runtime import UserError

OPTION = re.compile(r"^\s*-?\s*(?:\(([A-Z])\)\s*)?(.+?)\s*$")
FINAL_ANSWER = re.compile(r"answer(?:\s+is|\s*:)\s*:?\s*(.+?)\.?\s*$", re.IGNORECASE)
# What such prompts put before the question: "Question:", "Use reasoning to ...:", "Let's think step by step!"
PREAMBLE = re.compile(
    r"^(?:(?:some |next )?q(?:uestion)?(?: to you)?\s*:"
    r"|(?:let's|use|answer|please|i'll give|give|solve)\b[^.:!]*[.:!])\s*",
    re.IGNORECASE,
)
PLAIN_WORD = re.compile(r"[A-Za-z]{3,}")
MAX_ANSWER_WORDS = 16
MAX_QUESTION_CHARS = 400


@dataclass(frozen=True)
class ChoiceQuestion:
    """A question, its right answer, and at least one wrong one."""

    question: str
    right: str
    wrong: tuple[str, ...]


def write_choice(question: ChoiceQuestion, rng: random.Random) -> Messages:
    """The question with up to four choices in a random order, answered with a letter, in ChatCORE's form."""
    choices = [question.right, *rng.sample(question.wrong, min(len(LETTERS) - 1, len(question.wrong)))]
    rng.shuffle(choices)
    letters = LETTERS[: len(choices)]
    return ask_multiple_choice(question.question, letters, choices, answer=letters[choices.index(question.right)])


def vary_choices(questions: Sequence[ChoiceQuestion], variants: int, *, seed: str) -> Iterator[Messages]:
    """Each question so many times, each time with its choices drawn and ordered anew."""
    for variant in range(variants):
        for number, question in enumerate(questions):
            yield write_choice(question, random.Random(f"{seed} {variant} {number}"))


def read_public_question(name: str, row: dict[str, Any]) -> ChoiceQuestion:
    """A row of ARC or MMLU, as on the Hub."""
    if name == "MMLU":
        choices, answer = list(row["choices"]), int(row["answer"])
    elif name.startswith("ARC"):
        choices, answer = list(row["choices"]["text"]), list(row["choices"]["label"]).index(row["answerKey"])
    else:
        raise UserError(f"{name} has no choices; give ARC-Easy, ARC-Challenge or MMLU")
    return ChoiceQuestion(row["question"], choices[answer], tuple(choices[:answer] + choices[answer + 1 :]))


def read_listed_options(messages: Messages) -> ChoiceQuestion | None:
    """The question of a conversation that lists four "Options:" or more and whose reply ends with one; else None.

    What follows on the line of the last option cannot be told from it, so that option counts only where it is right.
    """
    if len(messages) != 2 or not all(isinstance(message["content"], str) for message in messages):
        return None
    before, mark, behind = messages[0]["content"].partition("\nOptions:\n")
    found = FINAL_ANSWER.search(messages[1]["content"].strip().rpartition("\n")[2])
    if not mark or found is None:
        return None
    listed = _list_options(behind)
    right = _pick_option(listed, found.group(1).strip())
    question = PREAMBLE.sub("", before.strip().rpartition("\n")[2]).strip()
    if right is None or not question:
        return None
    wrong = tuple(dict.fromkeys(text for _, text in listed[:-1] if text != right))
    return ChoiceQuestion(question, right, wrong) if len(wrong) >= len(LETTERS) - 1 else None


def _list_options(text: str) -> list[tuple[str | None, str]]:
    """(letter or None, option) of the lines that look like options, up to the first that does not."""
    options: list[tuple[str | None, str]] = []
    for line in text.split("\n"):
        if not line.lstrip().startswith(("-", "(")):
            options.append((None, ""))  # so that the option before it is known to be whole
            break
        found = OPTION.match(line)
        if found is not None:
            options.append((found.group(1), found.group(2)))
    return options


def _pick_option(listed: Sequence[tuple[str | None, str]], answer: str) -> str | None:
    letter = re.fullmatch(r"\(([A-Z])\)", answer)
    last = len(listed) - 1
    for number, (name, text) in enumerate(listed):
        if letter is not None and name == letter.group(1):
            return None if number == last else text
        same = text.lower() == answer.lower() or (number == last and text.lower().startswith(answer.lower()))
        if letter is None and same:
            return answer
    return None


def pair_with_others(conversations: Iterable[tuple[str, Messages]]) -> list[ChoiceQuestion]:
    """Questions with short answers in words, each beside the answers of others of its source (`(source, messages)`).

    They are easy, as the others answer something else, and teach what a letter stands for.
    """
    by_source: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for source, messages in conversations:
        if len(messages) == 2 and _is_short(messages[0]["content"], messages[1]["content"]):
            by_source[source].append((messages[0]["content"], messages[1]["content"]))
    questions = []
    for pairs in by_source.values():
        for number, (question, right) in enumerate(pairs):
            # Neighbours come from the same chapter, which makes them less easy to tell apart.
            others = [pairs[other][1] for other in range(number - 6, number + 7) if 0 <= other < len(pairs)]
            wrong = tuple(dict.fromkeys(text for text in others if text != right))
            if len(wrong) >= len(LETTERS) - 1:
                questions.append(ChoiceQuestion(question, right, wrong))
    return questions


def _is_short(question: Any, answer: Any) -> bool:
    if not isinstance(question, str) or not isinstance(answer, str):
        return False
    fits = len(question) <= MAX_QUESTION_CHARS and len(answer.split()) <= MAX_ANSWER_WORDS and "\n" not in answer
    return fits and PLAIN_WORD.search(answer) is not None

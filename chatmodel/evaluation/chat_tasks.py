"""What does ChatCORE ask? Its six tasks: their examples, prompts, and whether a reply is right.

Questions, order, subsets and baselines are nanochat's, so that the metric is comparable with its.
Source: karpathy/nanochat scripts/chat_eval.py and tasks/*.py@c75fe54.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatmodel.conversations.answers import check_answer
from chatmodel.conversations.datasets import load_task_rows, load_word_list, task_letters, task_messages
from chatmodel.conversations.generated import generate_conversation
from chatmodel.conversations.render import Messages, render_prompt
from chatmodel.evaluation.humaneval import build_program, run_programs
from chatmodel.runtime import UserError
from chatmodel.tokenizer import SPECIAL_TOKENS

# Accuracy by chance: one of four letters, or an open answer.
BASELINES = {"ARC-Easy": 0.25, "ARC-Challenge": 0.25, "MMLU": 0.25, "GSM8K": 0.0, "HumanEval": 0.0, "SpellingBee": 0.0}
SPELLING_BEE_SIZE = 256


@dataclass(frozen=True)
class ChatExample:
    """A conversation that ends with the reference reply, and the row it was made of (empty for SpellingBee)."""

    messages: Messages
    row: dict[str, Any]


def load_chat_examples(name: str, *, folder: Path | None, max_per_task: int | None = None) -> list[ChatExample]:
    """The examples of a task in nanochat's order, cut to the number asked for.

    Raises:
        DataAbsent: the task's data is neither in the folder nor on a Hub in reach.
        UserError: fewer than one example is asked for.
    """
    if max_per_task is not None and max_per_task < 1:
        raise UserError(f"max_per_task is {max_per_task}; give a number from 1 on, or leave it out for all")
    if name == "SpellingBee":
        words = load_word_list(folder)
        count = min(SPELLING_BEE_SIZE, max_per_task or SPELLING_BEE_SIZE)
        made = [generate_conversation(name, index, split="test", words=words) for index in range(count)]
        return [ChatExample(messages, {}) for messages in made]
    every = load_task_rows(name, "test", folder)
    rows = [every[index] for index in range(min(len(every), max_per_task or len(every)))]
    return [ChatExample(task_messages(name, row), row) for row in rows]


def is_categorical(name: str) -> bool:
    """Whether a task is answered with a letter, which is read from the logits, rather than with a written reply."""
    return BASELINES[name] > 0


def example_letters(name: str, example: ChatExample) -> list[str]:
    """The letters that answer an example of a categorical task."""
    return task_letters(name, example.row)


def render_chat_prompts(tokenizer: Any, conversations: Sequence[Messages]) -> list[list[int]]:
    """Ids of each conversation without its last message, up to where the reply begins."""
    return [render_chat_prompt(tokenizer, messages[:-1]) for messages in conversations]


def render_chat_prompt(tokenizer: Any, messages: Messages) -> list[int]:
    """Ids of a conversation that ends with the user, up to where the reply begins.

    Turns are marked as nanochat marks them; a foreign tokenizer renders them by its own chat template.

    Raises:
        UserError: the tokenizer knows neither.
    """
    if has_turn_marks(tokenizer):
        return render_prompt(tokenizer, messages)
    if getattr(tokenizer, "chat_template", None) is None:
        raise UserError(
            "the tokenizer has neither chatmodel's control tokens nor a chat template, so it cannot mark the turns of "
            "a conversation; evaluate a chat model, or set a chat_template in the tokenizer's folder"
        )
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))


def has_turn_marks(tokenizer: Any) -> bool:
    """Whether a tokenizer has the control tokens of our conversations."""
    return tokenizer.get_added_vocab().keys() >= set(SPECIAL_TOKENS)


def cut_prompt(ids: list[int], context: int | None, *, hard_limit: int | None = None) -> list[int]:
    """A prompt that fits a context; a longer one loses its end, but for the mark that begins the reply.

    As nanochat's it is then one longer than the context, unless that is a `hard_limit`, beyond which a model fails.
    """
    if context is None or len(ids) <= context:
        return ids
    return [*ids[: context if hard_limit is None else hard_limit - 1], ids[-1]]


def judge_reply(name: str, example: ChatExample, reply: str) -> bool:
    """Whether a written reply is right; HumanEval runs the program in it."""
    if name == "HumanEval":
        return run_programs([build_program(example.row, reply)])[0].success
    return check_answer(example.messages, reply)

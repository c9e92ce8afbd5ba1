"""Has the model learned what it was taught? Generated tasks on words, numbers and questions it never trained on."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from chatmodel.conversations.generated import (
    GENERATED_TASKS,
    WORD_TASKS,
    check_reply,
    generate_conversation,
    select_words,
)
from chatmodel.conversations.identity import Identity
from chatmodel.conversations.render import Messages, render_conversation, render_prompt
from chatmodel.data.words import load_words
from chatmodel.evaluation.chat_tasks import has_turn_marks
from chatmodel.evaluation.chatcore import ChatLimits, write_replies
from chatmodel.evaluation.scoring import get_device, share_decisions
from chatmodel.evaluation.statistics import binomial_stderr, pack_decisions
from chatmodel.runtime import UserError, logger


def evaluate_skills(
    model: Any,
    tokenizer: Any,
    *,
    names: Sequence[str] = GENERATED_TASKS,
    num_examples: int = 200,
    words: Sequence[str] | None = None,
    identity: Identity | None = None,
    limits: ChatLimits | None = None,
) -> dict[str, dict[str, Any]]:
    """For each skill `accuracy`, `correct`, `n`, `stderr`, `decisions`, and `chance`, what one fixed reply scores.

    Chance is defined by the reference replies: the share of questions that one of them, always given, would answer.
    For counting that is the share of the most common count; for spelling it is next to nothing.

    Args:
        names: generated tasks.
        words: what the words are drawn from, of which only those held out are; the embedded list if None.
        limits: batches and the length of replies, which also end at twice the longest reference.
    """
    unknown = [name for name in names if name not in GENERATED_TASKS]
    if unknown:
        raise UserError(f"there is no skill '{unknown[0]}'; known are {', '.join(GENERATED_TASKS)}")
    if num_examples < 1:
        raise UserError(f"num_skill_examples is {num_examples}; give a number from 1 on")
    held_out: list[str] = []
    if any(name in WORD_TASKS for name in names):
        held_out = select_words(load_words("embedded") if words is None else words, "test")
    skills = {}
    for name in names:
        conversations = draw_conversations(name, num_examples, words=held_out, identity=identity)
        skills[name] = _evaluate_skill(name, model, tokenizer, conversations, identity, limits or ChatLimits())
    return skills


def draw_conversations(name: str, count: int, *, words: Sequence[str], identity: Identity | None) -> list[Messages]:
    """The first `count` test conversations of a task with different questions; fewer where it has no more."""
    found: dict[str, Messages] = {}
    for index in range(20 * count):
        messages = generate_conversation(name, index, split="test", words=words, identity=identity)
        found.setdefault(messages[0]["content"], messages)
        if len(found) == count:
            break
    return list(found.values())


def _evaluate_skill(
    name: str,
    model: Any,
    tokenizer: Any,
    conversations: Sequence[Messages],
    identity: Identity | None,
    limits: ChatLimits,
) -> dict[str, Any]:
    room = 2 * max(measure_reply(tokenizer, messages) for messages in conversations)
    limits = replace(limits, max_new_tokens=min(room, limits.max_new_tokens))

    def decide(indices: range) -> list[bool]:
        chosen = [conversations[index] for index in indices]
        replies = write_replies(model, tokenizer, chosen, limits=limits, label=name)
        pairs = zip(chosen, replies, strict=True)
        return [check_reply(name, messages, reply, identity=identity) for messages, reply in pairs]

    right = share_decisions(len(conversations), decide, device=get_device(model))
    accuracy = sum(right) / len(right)
    stderr = binomial_stderr(accuracy, len(right))
    chance = measure_chance(name, conversations, identity=identity)
    logger.info("%s: %d of %d right, chance %.3f", name, sum(right), len(right), chance)
    return {
        "accuracy": accuracy,
        "correct": sum(right),
        "n": len(right),
        "stderr": stderr,
        "chance": chance,
        "decisions": pack_decisions(right),
    }


def measure_reply(tokenizer: Any, messages: Messages) -> int:
    """Tokens of the reference reply, with the end token."""
    if not has_turn_marks(tokenizer):
        return len(tokenizer.encode(write_reference(messages), add_special_tokens=False)) + 1
    whole = len(render_conversation(tokenizer, messages).input_ids)
    return whole - len(render_prompt(tokenizer, messages[:-1]))


def measure_chance(name: str, conversations: Sequence[Messages], *, identity: Identity | None = None) -> float:
    """The largest share of questions that any one of the reference replies answers."""
    best = 0
    for reply in {write_reference(messages) for messages in conversations}:
        best = max(best, sum(check_reply(name, messages, reply, identity=identity) for messages in conversations))
    return best / len(conversations)


def write_reference(messages: Messages) -> str:
    """The text of the last message, calculator calls included."""
    content = messages[-1]["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)

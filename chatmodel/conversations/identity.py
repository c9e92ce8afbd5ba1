"""Generated conversations about the model itself: who it is, who made it, what it can do."""

import datetime
import random
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from chatmodel.arguments import suggest
from chatmodel.conversations.identity_topics import (
    CLOSINGS,
    LATER_OPENINGS,
    OPENINGS,
    OPTIONAL_TOPICS,
    TOPICS,
)
from chatmodel.conversations.render import Messages
from chatmodel.runtime import UserError

HELD_OUT_QUESTIONS = 2
CLOSING_SHARE = 0.3


@dataclass(frozen=True)
class OwnQuestion:
    """A question of the user's own making, in several wordings, and its replies."""

    ask: tuple[str, ...]
    reply: tuple[str, ...]


@dataclass(frozen=True)
class Identity:
    """The facts a model tells about itself; each reply states one of them word for word.

    Those without a default are asked about where they are given: `date` stands behind "in", `size` behind "I have"
    ("3 million parameters"), `cannot` behind "I cannot" ("browse the web").
    """

    name: str = "chatmodel"
    kind: str = "a small language model"
    maker: str = "the chatmodel project"
    skills: str = "answer questions, spell words, count letters and calculate"
    training: str = "trained from scratch on text and conversations"
    limits: str = "I am small and often wrong"
    date: str | None = None
    size: str | None = None
    languages: str | None = None
    cannot: str | None = None
    home: str | None = None
    questions: tuple[OwnQuestion, ...] = ()

    def topics(self) -> dict[str, tuple[Sequence[str], Sequence[str], Sequence[str]]]:
        """(questions to train on, questions to test with, replies with the facts filled in) of each topic."""
        known = TOPICS | {name: topic for name, topic in OPTIONAL_TOPICS.items() if getattr(self, name)}
        topics: dict[str, tuple[Sequence[str], Sequence[str], Sequence[str]]] = {}
        for name, (questions, replies) in known.items():
            filled = [reply.format(**vars(self)) for reply in replies]
            topics[name] = (questions[:-HELD_OUT_QUESTIONS], questions[-HELD_OUT_QUESTIONS:], filled)
        for number, own in enumerate(self.questions):
            held_out = len(own.ask) // 5
            kept = len(own.ask) - held_out
            topics[f"question {number + 1}"] = (own.ask[:kept], own.ask[kept:], own.reply)
        return topics


def introduce_itself(index: int, split: str, identity: Identity, *, turns: int = 1) -> Messages:
    """Questions about the model, each with a reply that states a fact; "test" asks what no training conversation asks.

    Args:
        turns: at most so many questions in one conversation, each about something else; in training some of those with
            several end with thanks or a farewell.
    """
    rng = random.Random(f"identity {split} {index}")
    topics = {name: topic for name, topic in identity.topics().items() if topic[0 if split == "train" else 1]}
    first = rng.choice(list(topics))
    messages = _ask(rng, first, topics[first], split, OPENINGS)
    if turns > 1:
        later = [name for name in topics if name not in (first, "greeting")]
        for name in rng.sample(later, min(rng.randint(0, turns - 1), len(later))):
            messages += _ask(rng, name, topics[name], split, LATER_OPENINGS)
        if split == "train" and len(messages) > 2 and rng.random() < CLOSING_SHARE:
            messages += _write_turn(*rng.choice(CLOSINGS))
    return messages


def _ask(
    rng: random.Random,
    name: str,
    topic: tuple[Sequence[str], Sequence[str], Sequence[str]],
    split: str,
    openings: Sequence[str],
) -> Messages:
    question = rng.choice(topic[0 if split == "train" else 1])
    opening = "" if name == "greeting" else rng.choice(openings)
    if opening.endswith(", "):
        question = question[0].lower() + question[1:]
    question = opening + question
    if rng.random() < 0.3:
        question = question.lower()
    return _write_turn(question, rng.choice(topic[2]))


def _write_turn(question: str, reply: str) -> Messages:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]


def check_identity(messages: Messages, completion_text: str, identity: Identity) -> bool:
    """Whether a reply states the fact that was asked for: the first of the identity's facts in the reference reply.

    One of the user's own questions must be answered with one of its replies.
    """
    reference = messages[-1]["content"]
    for own in identity.questions:
        if reference in own.reply:
            return completion_text.strip() in own.reply
    facts = [fact for fact in _facts_by_weight(identity) if fact in reference]
    return bool(facts) and facts[0].lower() in completion_text.lower()


def _facts_by_weight(identity: Identity) -> list[str]:
    """The name last but for the kind, which replies about something else mention along the way."""
    optional = [getattr(identity, name) for name in OPTIONAL_TOPICS if getattr(identity, name)]
    core = [identity.maker, identity.skills, identity.training, identity.limits]
    return [*core, *optional, identity.name, identity.kind]


def load_identity(path: Path | str) -> Identity:
    """The facts in a YAML file; those it leaves out keep their defaults. A list of texts is joined: "a, b and c".

    Raises:
        UserError: the file is missing, no mapping of texts, or names an unknown fact.
    """
    try:
        facts: Any = yaml.safe_load(Path(path).read_text(encoding="utf-8-sig"))
    except OSError:
        raise UserError(f"identity file {path} does not exist; give a YAML file with the model's facts") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"identity file {path} is not valid YAML: {' '.join(str(error).split())}") from None
    known = [field.name for field in fields(Identity)]
    if not isinstance(facts, dict) or not facts:
        raise UserError(f"identity file {path} must give a text for each of its facts ({', '.join(known)})")
    unknown = [key for key in facts if key not in known]
    if unknown:
        hint = suggest(unknown[0], known)
        raise UserError(
            f"identity file {path} has the unknown fact '{unknown[0]}'{hint}; known are {', '.join(known)}"
        )
    questions = _read_questions(facts.pop("questions", None) or [], path)
    return Identity(**{key: _read_fact(key, value, path) for key, value in facts.items()}, questions=questions)


def _read_fact(key: str, value: Any, path: Path | str) -> str:
    if isinstance(value, list) and value and all(isinstance(each, str) and each.strip() for each in value):
        return " and ".join([", ".join(value[:-1]), value[-1]] if len(value) > 1 else value)
    if isinstance(value, int | float | datetime.date) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"identity file {path} must give a text for each of its facts, not {value!r} for '{key}'")
    return value.strip()


def _read_questions(entries: Any, path: Path | str) -> tuple[OwnQuestion, ...]:
    form = 'questions: [{ask: ["...", "..."], reply: "..."}]'
    if not isinstance(entries, list):
        raise UserError(f"identity file {path} has questions that are no list; write {form}")
    questions = []
    for number, entry in enumerate(entries, start=1):
        if not isinstance(entry, dict) or set(entry) != {"ask", "reply"}:
            raise UserError(f"question {number} of identity file {path} is not of the form {form}")
        texts = {key: [value] if isinstance(value, str) else value for key, value in entry.items()}
        for key, value in texts.items():
            if not isinstance(value, list) or not value or not all(isinstance(t, str) and t.strip() for t in value):
                raise UserError(f"question {number} of identity file {path} has no text for '{key}'; write {form}")
        questions.append(OwnQuestion(tuple(texts["ask"]), tuple(texts["reply"])))
    return tuple(questions)

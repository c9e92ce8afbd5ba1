"""Generated conversations about the model itself: who it is, who made it, what it can do."""

import random
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from chatmodel.conversations.render import Messages
from chatmodel.runtime import UserError


@dataclass(frozen=True)
class Identity:
    """The facts a model tells about itself; each reply states one of them word for word."""

    name: str = "chatmodel"
    kind: str = "a small language model"
    maker: str = "the chatmodel project"
    skills: str = "answer questions, spell words, count letters and calculate"
    training: str = "trained from scratch on text and conversations"
    limits: str = "I am small and often wrong"


# What is asked, and how it is answered; the last fifth of the questions is held out of training.
TOPICS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "name": (
        (
            "Who are you?",
            "What is your name?",
            "What are you called?",
            "Tell me your name.",
            "May I ask your name?",
            "Who am I talking to?",
            "What should I call you?",
            "Do you have a name?",
            "Please tell me who you are.",
            "And who are you?",
        ),
        ("I am {name}, {kind}.", "My name is {name}.", "I am called {name}."),
    ),
    "greeting": (
        (
            "Hi",
            "Hello",
            "Hello!",
            "Hey",
            "Good morning",
            "Hi there!",
            "Good evening",
            "Hey there",
            "Good day!",
            "Hello there!",
        ),
        ("Hello! I am {name}. How can I help?", "Hi, I am {name}. What can I do for you?"),
    ),
    "kind": (
        (
            "What are you?",
            "Are you a human?",
            "Are you a person?",
            "Are you a robot?",
            "Are you an AI?",
            "What kind of thing are you?",
            "Are you a real person?",
            "Am I talking to a human?",
            "Is this a machine?",
            "Are you a computer program?",
        ),
        ("I am {kind}.", "I am {kind}, not a person."),
    ),
    "maker": (
        (
            "Who made you?",
            "Who built you?",
            "Who created you?",
            "Where do you come from?",
            "Who is your maker?",
            "Who trained you?",
            "Which company made you?",
            "Who are your creators?",
            "Who is behind you?",
            "Tell me who made you.",
        ),
        ("I was made by {maker}.", "I come from {maker}."),
    ),
    "skills": (
        (
            "What can you do?",
            "What are you good at?",
            "How can you help me?",
            "What can I ask you?",
            "What are you for?",
            "Can you help me?",
            "What do you do?",
            "Tell me what you can do.",
            "What are your skills?",
            "What could I use you for?",
        ),
        ("I can {skills}.", "You can ask me to {skills}."),
    ),
    "training": (
        (
            "How were you made?",
            "How were you trained?",
            "How did you learn to talk?",
            "What were you trained on?",
            "How do you work?",
            "Where does your knowledge come from?",
            "How did you learn?",
            "What is your training data?",
            "Tell me how you were trained.",
            "How were you built?",
        ),
        ("I was {training}.", "I am {kind}, {training}."),
    ),
    "limits": (
        (
            "Can I trust you?",
            "Are you always right?",
            "Do you make mistakes?",
            "How good are you?",
            "What can't you do?",
            "Are you smart?",
            "Do you know everything?",
            "Are your answers correct?",
            "How reliable are you?",
            "What are your limits?",
        ),
        ("{limits}, so please check what I say.", "Please check my answers: {limits}."),
    ),
}
OPENINGS = ("", "", "", "Hi! ", "Hello, ", "Hey, ", "Excuse me, ", "Please, ")
HELD_OUT_QUESTIONS = 2


def introduce_itself(index: int, split: str, identity: Identity) -> Messages:
    """One question about the model and a reply with a fact; "test" asks what no training conversation asks."""
    rng = random.Random(f"identity {split} {index}")
    topic = rng.choice(list(TOPICS))
    questions, replies = TOPICS[topic]
    question = rng.choice(questions[:-HELD_OUT_QUESTIONS] if split == "train" else questions[-HELD_OUT_QUESTIONS:])
    opening = "" if topic == "greeting" else rng.choice(OPENINGS)
    if opening.endswith(", "):
        question = question[0].lower() + question[1:]
    question = opening + question
    if rng.random() < 0.3:
        question = question.lower()
    reply = rng.choice(replies).format(**asdict(identity))
    return [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]


def check_identity(messages: Messages, completion_text: str, identity: Identity) -> bool:
    """Whether a reply states the fact that was asked for: the first of the identity's facts in the reference reply."""
    reference = messages[-1]["content"]
    facts = [fact for fact in _facts_by_weight(identity) if fact in reference]
    return bool(facts) and facts[0].lower() in completion_text.lower()


def _facts_by_weight(identity: Identity) -> list[str]:
    """The name last but for the kind, which replies about something else mention along the way."""
    return [identity.maker, identity.skills, identity.training, identity.limits, identity.name, identity.kind]


def load_identity(path: Path | str) -> Identity:
    """The facts in a YAML file; those it leaves out keep their defaults.

    Raises:
        UserError: the file is missing, no mapping of texts, or names an unknown fact.
    """
    try:
        facts: Any = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"identity file {path} does not exist; give a YAML file with the model's facts") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"identity file {path} is not valid YAML: {' '.join(str(error).split())}") from None
    known = [field.name for field in fields(Identity)]
    if not isinstance(facts, dict) or not all(isinstance(fact, str) and fact.strip() for fact in facts.values()):
        raise UserError(f"identity file {path} must give a text for each of its facts ({', '.join(known)})")
    unknown = [key for key in facts if key not in known]
    if unknown:
        raise UserError(f"identity file {path} has the unknown fact '{unknown[0]}'; known are {', '.join(known)}")
    return Identity(**facts)

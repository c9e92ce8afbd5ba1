"""Generated conversations of several turns: one skill after the other, for models that learn each alone otherwise."""

import random
import re
from collections.abc import Callable

from chatmodel.conversations.render import Messages

SKILLS = ("Arithmetic", "WordProblems", "SimpleSpelling", "Identity")
LARGEST_INDEX = 1_000_000  # of the conversations that are chained
SPELLED = re.compile(r"\w+:\w(,\w)*")


def chain_skills(index: int, split: str, turns: int, draw: Callable[[str, int], Messages]) -> Messages:
    """Two to `turns` conversations of `SKILLS` as one.

    Args:
        draw: gives the conversation of a skill at an index.
    """
    rng = random.Random(f"multi-turn {split} {index}")
    messages: Messages = []
    for _ in range(rng.randint(2, max(2, turns))):
        messages += draw(rng.choice(SKILLS), rng.randrange(LARGEST_INDEX))
    return messages


def name_last_skill(messages: Messages) -> str:
    """Which skill the last reply shows, as far as checking a reply to it goes."""
    content = messages[-1]["content"]
    if not isinstance(content, str):
        return "Arithmetic"
    return "SimpleSpelling" if SPELLED.fullmatch(content) else "Identity"

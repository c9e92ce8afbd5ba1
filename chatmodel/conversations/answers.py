"""What number does a reply give, and is it the right one?"""

import re
from typing import Any

ANSWER_PATTERN = re.compile(r"#### (-?[0-9.,]+)")


def extract_answer(text: str) -> str | None:
    """The number behind the first "#### ", commas dropped, as text; None without one.

    Source: GSM8K's official answer extraction, by way of tasks/gsm8k.py@c75fe54.
    """
    found = ANSWER_PATTERN.search(text)
    return found.group(1).replace(",", "") if found else None


def reference_answer(messages: list[dict[str, Any]]) -> str | None:
    """The number that the last message of a conversation gives, a reply as text or in parts."""
    content = messages[-1]["content"]
    return extract_answer(content if isinstance(content, str) else content[-1]["text"])


def check_answer(messages: list[dict[str, Any]], completion_text: str) -> bool:
    """Whether a reply gives the same number as the conversation's own last message; no number is wrong."""
    expected = reference_answer(messages)
    return expected is not None and extract_answer(completion_text) == expected

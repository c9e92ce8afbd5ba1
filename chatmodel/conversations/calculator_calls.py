"""Where a reply calculates in plain text ("7+2 = 9"), how does it call the calculator instead?"""

import re

from chatmodel.conversations.render import Messages
from chatmodel.model.calculator import evaluate_expression

# An expression of plain numbers with at least one operator, and what it is said to give.
NUMBER = r"\(*-?\d[\d,]*(?:\.\d+)?\)*"
EQUATION = re.compile(rf"({NUMBER}(?:\s*[-+*/]\s*{NUMBER})+)(\s*=\s*)(-?\d[\d,]*(?:\.\d+)?)(?!\d|\.\d|\s*[-+*/]\s*\d)")


def call_calculator(text: str) -> list[dict[str, str]]:
    """The parts of a reply in which each right equation is followed by its call, as GSM8K's annotations are.

    "7+2 = 9" becomes the text "7+2 = ", the call "7+2", its result "9" and the text "9"; what the calculator refuses
    or finds otherwise stays text.
    """
    parts: list[dict[str, str]] = []
    end = 0
    for found in EQUATION.finditer(text):
        expression, equals, result = found.groups()
        value = evaluate_expression(expression)
        if value is None or value != result.replace(",", ""):
            continue
        before = text[end : found.start()] + expression + equals
        parts += [
            {"type": "text", "text": before},
            {"type": "python", "text": re.sub(r"\s", "", expression)},
            {"type": "python_output", "text": value},
        ]
        end = found.start(3)
    parts.append({"type": "text", "text": text[end:]})
    return parts


def add_calls(messages: Messages) -> Messages:
    """The conversation with calculator calls in the assistant's replies; one without an equation is as it was."""
    changed: Messages = []
    for message in messages:
        if message["role"] == "assistant" and isinstance(message["content"], str):
            parts = call_calculator(message["content"])
            changed.append({**message, "content": parts} if len(parts) > 1 else message)
        else:
            changed.append(message)
    return changed

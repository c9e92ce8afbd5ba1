"""How a reply is shown: the calculator's calls told from text, and nothing that steers a terminal or a page."""

from collections.abc import Iterable, Iterator
from html import escape
from typing import NamedTuple

# How the calculator's marks are shown: a call and its result as [12+30 = 42].
SHOWN_MARKS = {"<|python_start|>": "[", "<|python_end|>": "", "<|output_start|>": " = ", "<|output_end|>": "]"}
# A model may well write the characters that steer a terminal.
CONTROL_CHARACTERS = {
    code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"
}


class Shown(NamedTuple):
    """A piece of text to show, and whether it belongs to a calculator call."""

    text: str
    is_call: bool


def show_calls(pieces: Iterable[str]) -> Iterator[Shown]:
    """Pieces of a reply (marks by themselves) as they are shown; a call without a result ends as [abc]."""
    inside = asked = False
    for piece in pieces:
        if asked and piece != "<|output_start|>":  # the calculator refused
            yield Shown("]", True)
            inside = False
        asked = piece == "<|python_end|>"
        inside = inside or piece == "<|python_start|>"
        shown = SHOWN_MARKS.get(piece, piece.translate(CONTROL_CHARACTERS))
        if shown:
            yield Shown(shown, inside)
        inside = inside and piece != "<|output_end|>"
    if inside:
        yield Shown("]", True)


def show_parts(content: str | list[dict[str, str]]) -> Iterator[Shown]:
    """The same of an assistant's message that was kept: a text, or its parts."""
    marks = {
        "python": ("<|python_start|>", "<|python_end|>"),
        "python_output": ("<|output_start|>", "<|output_end|>"),
    }
    pieces: list[str] = []
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        opening, closing = marks.get(part["type"], ("", ""))
        pieces += filter(None, (opening, part["text"], closing))
    yield from show_calls(pieces)


def as_html(shown: Iterable[Shown]) -> str:
    """What is shown as HTML in which only calls are marked up; no letter of it is HTML or Markdown of its own."""
    merged: list[Shown] = []
    for piece in shown:
        if merged and merged[-1].is_call == piece.is_call:
            merged[-1] = Shown(merged[-1].text + piece.text, piece.is_call)
        else:
            merged.append(piece)
    return "".join(
        f'<span class="call" title="the calculator">{escape_all(piece.text)}</span>'
        if piece.is_call
        else escape_all(piece.text)
        for piece in merged
    )


def escape_all(text: str) -> str:
    """Text as HTML in which neither HTML nor Markdown can be read; line breaks stay."""
    text = text.translate(CONTROL_CHARACTERS)
    escaped = "".join(
        letter if letter.isalnum() or letter == " " else "<br>" if letter == "\n" else f"&#{ord(letter)};"
        for letter in text
    )
    return escaped.replace("  ", " &nbsp;")


def escape_text(text: str) -> str:
    """Text as the content of an HTML element or attribute."""
    return escape(text.translate(CONTROL_CHARACTERS))

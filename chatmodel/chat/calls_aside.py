"""How a server tells the calculator's calls from the text of an answer."""

import re
from collections.abc import Iterator
from typing import Any

from tokenizers.decoders import DecodeStream

from chatmodel.tokenizer import SPECIAL_TOKENS

CONTROL_TOKENS = re.compile("(" + "|".join(re.escape(token) for token in SPECIAL_TOKENS) + ")")


class CallsAside:
    """Parses a reply as it comes; takes the place of Transformers' `ResponseParser`, whose events it makes.

    Text is `content`; a call and its result are one line of `reasoning_content`, "12+30 = 42", or left out. What the
    model only spells like a control token comes in pieces, so a piece that has one whole means it.
    """

    def __init__(self, *, show_calls: bool) -> None:
        self.show_calls = show_calls
        self.initial_events: list[dict[str, Any]] = []
        self.inside = False

    def feed(self, text: str) -> list[dict[str, Any]]:
        """Events of the next decoded token."""
        return [event for piece in CONTROL_TOKENS.split(text) if piece for event in self._read(piece)]

    def finalize(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The message is not used by the server's streams."""
        return {}, []

    def _read(self, piece: str) -> Iterator[dict[str, Any]]:
        match piece:
            case "<|python_start|>":
                self.inside = True
            case "<|output_start|>":
                self.inside = True
                yield from self._chunk(" = ")
            case "<|python_end|>":
                self.inside = False
            case "<|output_end|>":
                yield from self._chunk("\n")
                self.inside = False
            case _ if not CONTROL_TOKENS.fullmatch(piece):
                yield from self._chunk(piece)

    def _chunk(self, text: str) -> Iterator[dict[str, Any]]:
        if self.show_calls or not self.inside:
            field = "reasoning_content" if self.inside else "content"
            yield {"type": "region_chunk", "field": field, "text": text}


def split_reply(tokenizer: Any, ids: list[int], *, show_calls: bool) -> tuple[str, str | None]:
    """Content and calls of a whole reply, the same letters as its stream has."""
    stream, parser = DecodeStream([], skip_special_tokens=False), CallsAside(show_calls=show_calls)
    texts = {"content": "", "reasoning_content": ""}
    for token_id in ids:
        for event in parser.feed(stream.step(tokenizer._tokenizer, token_id) or ""):
            texts[event["field"]] += event["text"]
    return texts["content"], texts["reasoning_content"] or None

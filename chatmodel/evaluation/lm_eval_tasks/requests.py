"""How are token ids scored by lm_eval as they are, without its own tokenization?

`loglikelihood` takes texts, joins and splits them by its own rules and adds a BOS or not: prompts would not be CORE's.
These requests go to `_loglikelihood_tokens`, which takes ids, and in which lm_eval's own methods end.
"""

from collections.abc import Iterator
from typing import Any, SupportsIndex, overload

from lm_eval.api.instance import Instance

# The method of lm_eval's models that scores ids.
SCORE_TOKENS = "_loglikelihood_tokens"


class TokenRequest(Instance):  # type: ignore[misc]
    """Ids of a text, of which those from `start` on are scored; reads as the triple (None, context, continuation)."""

    def __init__(self, tokens: list[int], start: int, *, text: str, doc: Any, index: int, metadata: Any) -> None:
        super().__init__(request_type=SCORE_TOKENS, doc=doc, arguments=(text,), idx=index, metadata=metadata)
        self.triple = (None, Context(tokens[:start]), list(tokens[start:]))

    def __getitem__(self, index: int) -> Any:
        return self.triple[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.triple)


class Whole(list[int]):
    """Ids that a slice [-n:] leaves whole: lm_eval cuts so at `max_position_embeddings`, where rotary models go on.

    What a model cannot take has been cut before, in the way of our own scorer.
    """

    @overload
    def __getitem__(self, key: SupportsIndex, /) -> int: ...
    @overload
    def __getitem__(self, key: slice, /) -> list[int]: ...
    def __getitem__(self, key: Any, /) -> Any:
        if isinstance(key, slice) and key.stop is None and key.start is not None and key.start < 0:
            return list(self)
        return super().__getitem__(key)


class Context(list[int]):
    """Ids before a continuation: joined they are `Whole`, and their length, by which lm_eval only warns of a cut that
    does not happen, is at most 1."""

    def __len__(self) -> int:
        return min(1, super().__len__())

    def __add__(self, other: list[int], /) -> Whole:  # type: ignore[override]
        return Whole([*self, *other])

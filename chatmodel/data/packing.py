"""Which tokens make up each row: documents one after the other, or whole documents fitted together?"""

from bisect import bisect_left, bisect_right, insort
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Span = tuple[int, int]  # (start, stop) in the tokens of a store


class RowPlan(Protocol):
    """One sequence of rows, endless or finite, that follows from the lengths of the documents and a seed alone."""

    def next_row(self) -> list[Span] | None:
        """The spans of the next row, `row_tokens` together; None when the epochs are over."""

    def state_dict(self) -> dict[str, Any]:
        """Plain values from which `load_state_dict` continues with the next row; `epoch` is the pass it stands in."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the row that was next when the state was taken."""


class ContiguousPlan:
    """The documents one after the other, cut into rows that overlap by the one token that is label and then input.

    The rows of an epoch come in a random order; from the second epoch on they are cut at other places.
    """

    def __init__(self, num_tokens: int, row_tokens: int, *, epochs: int | None, seed: int) -> None:
        self.num_tokens = num_tokens
        self.stride = row_tokens - 1
        self.epochs = epochs
        self.seed = seed
        self._begin(epoch=0, position=0)

    def _begin(self, *, epoch: int, position: int) -> None:
        generator = np.random.default_rng((self.seed, epoch))
        # The cuts move by less than a row, and by no more than leaves one whole row.
        room = min(self.stride, self.num_tokens - self.stride)
        self.offset = int(generator.integers(room)) if epoch else 0
        self.order = generator.permutation((self.num_tokens - self.offset - 1) // self.stride)
        self.epoch = epoch
        self.position = position

    def next_row(self) -> list[Span] | None:
        """One span."""
        if self.position == len(self.order):
            self._begin(epoch=self.epoch + 1, position=0)
        if self.epochs is not None and self.epoch >= self.epochs:
            return None
        start = self.offset + int(self.order[self.position]) * self.stride
        self.position += 1
        return [(start, start + self.stride + 1)]

    def state_dict(self) -> dict[str, Any]:
        """The epoch and the rows given in it."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Draw the epoch's order again."""
        self._begin(epoch=state["epoch"], position=state["position"])


class BestFitPlan:
    """Whole documents, fitted together so that each row begins with one and little is cropped.

    A buffer holds the next documents of a random order. The longest that fits is placed until none does; then the
    shortest is cropped to fill the row. Of equal lengths the earlier is taken.

    With `keep_rests` nothing is lost: a document longer than a row is cut into rows beforehand, each with a place of
    its own in the order, and what cropping leaves goes back to the buffer. Rows can then begin within a document.
    Without it the rest of a cropped document is not seen in that epoch: 29 % of a text with many long documents.

    Source: karpathy/nanochat nanochat/dataloader.py@92d63d4 (without rests); the sorted buffer is ours (there each
    search walks through all of it). arXiv 2404.10830 packs without losing anything, with padding.
    """

    def __init__(
        self,
        offsets: NDArray[np.int64],
        row_tokens: int,
        *,
        epochs: int | None,
        seed: int,
        buffer_documents: int,
        keep_rests: bool = False,
    ) -> None:
        self.row_tokens = row_tokens
        self.epochs = epochs
        self.seed = seed
        self.keep_rests = keep_rests
        self.starts, self.stops = offsets[:-1], offsets[1:]
        if keep_rests:
            self.starts, self.stops = cut_documents(offsets, row_tokens)
        # With more, a small store would put several copies of its longest documents before the rest.
        self.capacity = min(buffer_documents, len(self.starts))
        self.buffer: list[tuple[int, int, int]] = []  # (length, arrival, start), sorted
        self.arrivals = 0
        self._begin(epoch=0, position=0)

    def _begin(self, *, epoch: int, position: int) -> None:
        self.order = np.random.default_rng((self.seed, epoch)).permutation(len(self.starts))
        self.epoch = epoch
        self.position = position

    def next_row(self) -> list[Span] | None:
        """One span for each document; only the last one can be cropped."""
        spans: list[Span] = []
        room = self.row_tokens
        while room:
            self._fill_buffer()
            if not self.buffer:
                return None
            following = bisect_right(self.buffer, (room + 1,))
            if following:
                longest = self.buffer[following - 1][0]
                length, _, start = self.buffer.pop(bisect_left(self.buffer, (longest,)))
            else:
                whole, _, start = self.buffer.pop(0)
                length = room
                if self.keep_rests:
                    self._add(start + room, start + whole)
            spans.append((start, start + length))
            room -= length
        return spans

    def _fill_buffer(self) -> None:
        while len(self.buffer) < self.capacity:
            if self.position == len(self.order):
                if self.epochs is not None and self.epoch + 1 >= self.epochs:
                    return
                self._begin(epoch=self.epoch + 1, position=0)
            chosen = self.order[self.position]
            self._add(int(self.starts[chosen]), int(self.stops[chosen]))
            self.position += 1

    def _add(self, start: int, stop: int) -> None:
        insort(self.buffer, (stop - start, self.arrivals, start))
        self.arrivals += 1

    def state_dict(self) -> dict[str, Any]:
        """The place in the order, and the buffered spans as they arrived."""
        buffered = sorted((arrival, start, start + length) for length, arrival, start in self.buffer)
        spans = [[start, stop] for _, start, stop in buffered]
        return {"epoch": self.epoch, "position": self.position, "buffer": spans}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Draw the epoch's order again and fill the buffer as it was."""
        self._begin(epoch=state["epoch"], position=state["position"])
        self.buffer = []
        self.arrivals = 0
        for start, stop in state["buffer"]:
            self._add(start, stop)


def cut_documents(offsets: NDArray[np.int64], row_tokens: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where the pieces of all documents start and stop: `row_tokens` each, but for the last of a document."""
    pieces = -(-np.diff(offsets) // row_tokens)  # of each document
    numbers = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)  # 0, 1, ... within a document
    starts = np.repeat(offsets[:-1], pieces) + numbers * row_tokens
    return starts, np.minimum(starts + row_tokens, np.repeat(offsets[1:], pieces))

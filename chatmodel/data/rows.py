"""Which rows of equal length does the model see, on which rank, and how is that resumed exactly?"""

import math
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import IterableDataset

from chatmodel.data.packing import BestFitPlan, ContiguousPlan, RowPlan, Span
from chatmodel.data.store import TokenStore
from chatmodel.runtime import UserError, warn_once

IGNORED = -100  # a label that is not scored
PACKINGS = ("best_fit", "best_fit_whole", "contiguous")
BUFFER_DOCUMENTS = 1_000  # Source: karpathy/nanochat nanochat/dataloader.py@92d63d4
SAMPLED_ROWS = 16_384  # planned in advance, in a third of a second at most, to see how many documents rows hold

Row = dict[str, torch.Tensor]


class PackedRows(IterableDataset[Row]):
    """Rows of `input_ids` and `shift_labels`, both (T,) int64, where T is `sequence_length`.

    `shift_labels[t]` is the token after `input_ids[t]`, so that a row reads T + 1 tokens; all are scored. Every rank
    plans the same sequence of rows and gives those numbered rank, rank + world_size, ... A state is therefore the same
    on all ranks, and good for another number of ranks. Iterating continues where the rows stand, it never starts anew.

    Args:
        documents_apart: batches also have `document_starts` (`find_document_starts`), for as many documents as
            `document_capacity`.
        packing: "contiguous" (`ContiguousPlan`), "best_fit" or, with rests kept, "best_fit_whole" (`BestFitPlan`).
        epochs: passes over the documents, None for no end; every rank gives equally many rows.

    Raises:
        UserError: the store holds less than one row, or a value makes no sense.
    """

    def __init__(
        self,
        store: TokenStore,
        *,
        sequence_length: int,
        packing: str = "best_fit_whole",
        rank: int = 0,
        world_size: int = 1,
        epochs: int | None = None,
        seed: int = 42,
        buffer_documents: int = BUFFER_DOCUMENTS,
        documents_apart: bool = False,
    ) -> None:
        check_rows_fit(store, sequence_length)
        if packing not in PACKINGS:
            raise UserError(f"packing '{packing}' is unknown; choose {', '.join(PACKINGS[:-1])} or {PACKINGS[-1]}")
        assert 0 <= rank < world_size, (rank, world_size)
        self.store = store
        self.sequence_length = sequence_length
        self.packing = packing
        self.documents_apart = documents_apart
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.buffer_documents = buffer_documents
        self.plan = self._build_plan(epochs)

    def _build_plan(self, epochs: int | None) -> RowPlan:
        row_tokens = self.sequence_length + 1
        if self.packing == "contiguous":
            return ContiguousPlan(self.store.num_tokens, row_tokens, epochs=epochs, seed=self.seed)
        return BestFitPlan(
            self.store.offsets,
            row_tokens,
            epochs=epochs,
            seed=self.seed,
            buffer_documents=self.buffer_documents,
            keep_rests=self.packing == "best_fit_whole",
        )

    @property
    def epoch(self) -> int:
        """The pass over the documents that the next row comes from, counted from 0."""
        return int(self.plan.state_dict()["epoch"])

    def __iter__(self) -> Iterator[Row]:
        while (spans := self._plan_row()) is not None:
            row = self._read_rows([spans])[0]
            yield {"input_ids": row[:-1], "shift_labels": row[1:]}

    def batches(self, batch_size: int) -> Iterator[tuple[Row, dict[str, Any]]]:
        """Batches of (B, T), and with each the state behind it; the last one can have fewer rows.

        Faster than a `DataLoader`, and fit for a thread that reads ahead, as the state is that of the batch, not that
        of the thread.
        """
        if batch_size < 1:
            raise UserError(f"a batch of {batch_size} rows is asked for; give a number of at least 1")
        spans: list[list[Span]] = []
        while (row := self._plan_row()) is not None:
            spans.append(row)
            if len(spans) == batch_size:
                yield self._read_batch(spans), self.state_dict()
                spans = []
        if spans:
            yield self._read_batch(spans), self.state_dict()

    def _plan_row(self) -> list[Span] | None:
        """The spans of this rank's next row; None when not every rank has one more."""
        plans = [self.plan.next_row() for _ in range(self.world_size)]
        return None if None in plans else plans[self.rank]

    def _read_rows(self, rows: list[list[Span]]) -> torch.Tensor:
        """(rows, T + 1) int64."""
        tokens = self.store.read_spans([span for spans in rows for span in spans])
        return torch.from_numpy(tokens.astype(np.int64)).view(len(rows), self.sequence_length + 1)

    def _read_batch(self, rows: list[list[Span]]) -> Row:
        tokens = self._read_rows(rows)
        batch = {"input_ids": tokens[:, :-1].contiguous(), "shift_labels": tokens[:, 1:].contiguous()}
        if self.documents_apart:
            capacity = self.document_capacity(len(rows))
            starts = find_document_starts(rows, self.store.offsets, length=self.sequence_length, capacity=capacity)
            batch["document_starts"] = torch.from_numpy(starts)
        return batch

    def document_capacity(self, batch_size: int) -> int:
        """Documents that a batch's `document_starts` has room for: more than any batch of a long sample holds.

        A fixed number, since compiled code wants the same shape every time; and every place costs a little. A quarter
        and the fullest row more than the fullest batch of the sample: that held for all rows of the texts tried but
        for one batch in 100,000, of a text sorted by length.
        """
        counts = self._documents_of_rows
        fullest = int(np.convolve(counts, np.ones(batch_size, dtype=np.int64)).max())
        return math.ceil(1.25 * fullest) + int(counts.max())

    @cached_property
    def _documents_of_rows(self) -> NDArray[np.int64]:
        """Documents, or parts of them, in each of the first rows of an endless plan: the same at every start."""
        plan, offsets = self._build_plan(None), self.store.offsets
        counts = []
        for _ in range(SAMPLED_ROWS):
            spans = np.array(plan.next_row())
            begun = np.searchsorted(offsets, spans[:, 1]) - np.searchsorted(offsets, spans[:, 0] + 1)
            counts.append(len(spans) + int(begun.sum()))
        return np.array(counts)

    def state_dict(self) -> dict[str, Any]:
        """Where the rows stand, as plain values: small, and the same on every rank."""
        return {"packing": self.packing, "sequence_length": self.sequence_length, **self.plan.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly behind the last row given before the state was taken.

        Raises:
            UserError: the state is of rows that were packed in another way.
        """
        for name in ("packing", "sequence_length"):
            if state[name] != getattr(self, name):
                raise UserError(
                    f"the checkpoint was made with {name} {state[name]}, now it is {getattr(self, name)};"
                    " set it back, or start a new run"
                )
        self.plan.load_state_dict(state)


def find_document_starts(
    rows: list[list[Span]], offsets: NDArray[np.int64], *, length: int, capacity: int
) -> NDArray[np.int32]:
    """Where documents, or parts of them, start among the B * `length` inputs of a batch, as attention kernels want it.

    Returns (capacity + 1,) int32, ascending from 0; B * `length` ends it and fills what is left. If there are more
    documents than places, starts within rows are left out from the batch's end on, with a warning: those documents
    see each other.
    """
    starts = [np.arange(len(rows)) * length]  # of the rows: these are never left out
    for number, spans in enumerate(rows):
        place = number * length
        end = place + length  # the last token of a row is a label only
        for start, stop in spans:
            first, last = np.searchsorted(offsets, (start + 1, stop))
            within = np.concatenate(([place], place + offsets[first:last] - start))
            starts.append(within[(within < end) & (within > number * length)])
            place += stop - start
    inner = np.concatenate(starts[1:])
    if len(rows) + len(inner) > capacity:
        warn_once("a batch holds more documents than are provided for: the last of them are not kept apart")
        inner = inner[: capacity - len(rows)]
    found = np.full(capacity + 1, len(rows) * length, dtype=np.int32)
    found[: len(rows) + len(inner)] = np.sort(np.concatenate((starts[0], inner)))
    return found


def validation_rows(
    store: TokenStore, *, sequence_length: int, max_tokens: int | None = None, documents_apart: bool = False
) -> Iterator[Row]:
    """The store from its beginning in contiguous rows, always the same: each token but the first is a label once.

    The last row is filled up with ids 0 and labels -100.

    Args:
        max_tokens: labels at most; by default all.
        documents_apart: rows also have `position_ids` (T,) that restart at each document, by which a model attends
            within documents: in any of Transformers' ways to attend, and as trained, as its positions are relative.
    """
    if sequence_length < 1:
        raise UserError(f"sequence_length is {sequence_length}; give a number of at least 1")
    num_labels = store.num_tokens - 1 if max_tokens is None else min(max_tokens, store.num_tokens - 1)
    for start in range(0, num_labels, sequence_length):
        chunk = torch.from_numpy(store.tokens[start : min(start + sequence_length, num_labels) + 1].astype(np.int64))
        input_ids = torch.zeros(sequence_length, dtype=torch.int64)
        shift_labels = torch.full((sequence_length,), IGNORED)
        input_ids[: len(chunk) - 1] = chunk[:-1]
        shift_labels[: len(chunk) - 1] = chunk[1:]
        row = {"input_ids": input_ids, "shift_labels": shift_labels}
        if documents_apart:
            row["position_ids"] = torch.from_numpy(_count_positions(store, start, sequence_length))
        yield row


def _count_positions(store: TokenStore, start: int, length: int) -> NDArray[np.int64]:
    """(length,) how far each token from `start` on is from the beginning of its document, or of the row if later."""
    places = np.arange(start, start + length)
    documents = np.searchsorted(store.offsets, places, side="right") - 1
    return places - np.maximum(store.offsets[documents], start)


def check_rows_fit(store: TokenStore, sequence_length: int) -> None:
    """Raise a `UserError` unless the store can fill a row."""
    if sequence_length < 1:
        raise UserError(f"sequence_length is {sequence_length}; give a number of at least 1")
    if store.num_tokens < sequence_length + 1:
        raise UserError(
            f"sequence_length {sequence_length} is longer than the data: the token store {store.folder} holds only"
            f" {store.num_tokens} tokens; choose a shorter sequence_length or give more text"
        )

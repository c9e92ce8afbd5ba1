"""Which conversations share a row, and how do rows become batches of one shape?"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray

from chatmodel.data.rows import IGNORED
from chatmodel.runtime import UserError

Batch = dict[str, Any]


class ConversationRows:
    """Conversations laid into rows of `length` positions, each a document of its own.

    `dataset` is what a Trainer draws from, numbers of rows; `collate` makes batches of them. All conversations are
    held as two flat arrays, so a batch is cut out of them without a list in between.

    Args:
        conversations: what `load_mixture` gives: `input_ids`, `labels` (unshifted, -100 not trained), `source`.
        packed: several conversations a row, by `pack_best_fit`; else one, in the data set's order.
        fixed: batches always have the shape (`batch_size`, `length`), as compiled code wants it; else they are as
            long as their longest row. What is left over is padding without labels, seen by nothing.
    """

    def __init__(
        self,
        conversations: Dataset,
        *,
        length: int,
        batch_size: int,
        pad_token_id: int,
        packed: bool = True,
        fixed: bool = False,
    ) -> None:
        table = conversations.with_format("arrow")[:]
        self.tokens, lengths = _flatten(table["input_ids"])
        self.labels, _ = _flatten(table["labels"])
        assert len(self.tokens) == len(self.labels)
        assert lengths.max() <= length, (int(lengths.max()), length)
        self.ends = lengths.cumsum()
        self.begins = self.ends - lengths
        self.names, self.sources = _number(table["source"].to_pylist())
        self.length, self.batch_size, self.pad_token_id, self.fixed = length, batch_size, pad_token_id, fixed
        self.rows = pack_best_fit(lengths, length) if packed else [[number] for number in range(len(lengths))]
        self.dataset = Dataset.from_dict({"row": range(len(self.rows))})
        most = max(len(row) for row in self.rows)
        self.capacity = batch_size * (most + 1)  # of documents in a batch: padding is one too

    def collate(self, examples: Iterable[dict[str, int]]) -> Batch:
        """A batch (see `lay_out`) of elements of `dataset`."""
        return self.lay_out([self.rows[example["row"]] for example in examples])

    def lay_out(self, rows: Sequence[Sequence[int]], *, with_sources: bool = False) -> Batch:
        """Rows of numbers of conversations as a batch.

        Returns `input_ids`, `shift_labels` (the label follows its position; none crosses a border) and `position_ids`
        (which start anew in each conversation), all (B, T), `document_starts` (as `find_document_starts` gives them),
        and plain numbers: `num_tokens`, without padding, and `num_trained`, those with a label.

        Args:
            with_sources: also `sources` (B, T), each position's number in `names`.
        """
        fills = [sum(int(self.ends[n] - self.begins[n]) for n in row) for row in rows]
        height, width = (self.batch_size, self.length) if self.fixed else (len(rows), max(fills))
        documents = np.array([number for row in rows for number in row])
        lengths = self.ends[documents] - self.begins[documents]
        # Where each document goes: its row's beginning, and what the row holds before it.
        rows_before = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
        filled = lengths.cumsum() - lengths
        places = rows_before * width + filled - (np.cumsum(fills) - fills)[rows_before]
        within = np.arange(lengths.sum()) - np.repeat(filled, lengths)
        target, source = np.repeat(places, lengths) + within, np.repeat(self.begins[documents], lengths) + within
        following = self.labels[np.minimum(source + 1, len(self.labels) - 1)].astype(np.int64)
        following[filled + lengths - 1] = IGNORED
        fills += [0] * (height - len(rows))
        padding = [number * width + fill for number, fill in enumerate(fills) if fill < width]
        batch = {
            "input_ids": _scatter(height, width, self.pad_token_id, target, self.tokens[source]),
            "shift_labels": _scatter(height, width, IGNORED, target, following),
            "position_ids": _scatter(height, width, 0, target, within),
            "document_starts": self._list_starts([*places, *padding], height * width),
            "num_tokens": int(lengths.sum()),
            "num_trained": int((following != IGNORED).sum()),
        }
        if with_sources:
            batch["sources"] = _scatter(height, width, 0, target, np.repeat(self.sources[documents], lengths))
        return batch

    def _list_starts(self, places: Sequence[int], tokens: int) -> torch.Tensor:
        """Ascending from 0, and `tokens` behind the last and, with `fixed`, as filler."""
        starts = torch.full((self.capacity + 1 if self.fixed else len(places) + 1,), tokens, dtype=torch.int32)
        starts[: len(places)] = torch.from_numpy(np.sort(np.array(places, dtype=np.int32)))
        return starts


class StreamRows:
    """Conversations one after the other, cut into full rows wherever a row ends; what is left over is not used.

    As in nanochat's mid-training a row attends over all it holds, and of the tokens of a micro-batch and the one
    behind them the next begins after. TRL's strategy "wrapped".

    Source: karpathy/nanochat@c75fe54 scripts/mid_train.py, `mid_data_generator`, on one process.

    Raises:
        UserError: there is less than one micro-batch.
    """

    def __init__(self, conversations: Dataset, *, length: int, batch_size: int) -> None:
        table = conversations.with_format("arrow")[:]
        self.tokens, self.labels = (_flatten(table[name])[0] for name in ("input_ids", "labels"))
        self.length, self.batch_size = length, batch_size
        stride = batch_size * length + 1
        micro_batches = len(self.tokens) // stride
        if not micro_batches:
            raise UserError(
                f"the mixture has {len(self.tokens)} tokens, and a micro-batch of {batch_size} rows takes {stride}; "
                "lower per_device_train_batch_size or max_length, or give more conversations"
            )
        self.rows = [stride * number + length * row for number in range(micro_batches) for row in range(batch_size)]
        self.dataset = Dataset.from_dict({"row": range(len(self.rows))})

    def collate(self, examples: Iterable[dict[str, int]]) -> Batch:
        """A batch as `ConversationRows` gives it, each row one document."""
        begins = np.array([self.rows[example["row"]] for example in examples])
        places = begins[:, None] + np.arange(self.length)
        shift_labels = torch.from_numpy(self.labels[places + 1].astype(np.int64))
        tokens = places.size
        return {
            "input_ids": torch.from_numpy(self.tokens[places].astype(np.int64)),
            "shift_labels": shift_labels,
            "position_ids": torch.arange(self.length).expand(len(begins), -1).contiguous(),
            "document_starts": torch.arange(0, tokens + 1, self.length, dtype=torch.int32),
            "num_tokens": tokens,
            "num_trained": int((shift_labels != IGNORED).sum()),
        }


def pack_best_fit(lengths: NDArray[np.int64], capacity: int) -> list[list[int]]:
    """Rows of numbers of documents: the longest first, each into the fullest row that has room (best-fit decreasing).

    TRL's strategy "bfd" too. Rows, and documents in a row, are then brought into the order of the documents.
    """
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # rows, by how many places they have left
    open_rooms = 0  # bit n is set where a row has n places left
    for document in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[document])
        enough = open_rooms >> length
        room = length + (enough & -enough).bit_length() - 1 if enough else capacity
        if enough:
            row = by_room[room].pop()
            if not by_room[room]:
                open_rooms ^= 1 << room
        else:
            row = len(rows)
            rows.append([])
        rows[row].append(document)
        if room > length:
            by_room[room - length].append(row)
            open_rooms |= 1 << (room - length)
    return sorted(sorted(row) for row in rows)


def _flatten(column: Any) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """The values of a column of lists, one after the other, and the lists' lengths."""
    chunks = column.chunks
    values = np.concatenate([chunk.flatten().to_numpy(zero_copy_only=False) for chunk in chunks])
    lengths = np.concatenate([chunk.value_lengths().to_numpy(zero_copy_only=False) for chunk in chunks])
    return values.astype(np.int32, copy=False), lengths.astype(np.int64)


def _number(names: Sequence[str]) -> tuple[list[str], NDArray[np.int64]]:
    """Distinct names in the order in which they come first, and for each element its name's number."""
    distinct = list(dict.fromkeys(names))
    numbers = {name: number for number, name in enumerate(distinct)}
    return distinct, np.array([numbers[name] for name in names])


def _scatter(height: int, width: int, filler: int, target: NDArray[np.int64], values: Any) -> torch.Tensor:
    filled = np.full(height * width, filler, dtype=np.int64)
    filled[target] = values
    return torch.from_numpy(filled).view(height, width)

"""How do rows of text reach the device as batches, and where does the next one stand?"""

from collections.abc import Generator, Iterable, Iterator
from itertools import islice
from typing import Any, cast

import torch
from torch.utils.data import default_collate

from chatmodel.data.loading import read_ahead
from chatmodel.data.rows import PackedRows

Batch = dict[str, torch.Tensor]


class Loader:
    """Batches of rows on the device, read ahead by a thread; `position` is where the rows stand behind the last one.

    Args:
        timeout: most seconds to wait for a batch; `take` raises a `UserError` then.
    """

    def __init__(self, rows: PackedRows, *, batch_size: int, device: torch.device, timeout: float) -> None:
        self.position = rows.state_dict()
        self._device = device
        batches = pin_batches(rows.batches(batch_size)) if device.type == "cuda" else rows.batches(batch_size)
        items = read_ahead(batches, source=f"the token store {rows.store.folder}", timeout=timeout)
        self._items = cast("Generator[tuple[Batch, dict[str, Any]]]", items)

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self._items.close()

    def take(self) -> Batch:
        """The next batch (B, T)."""
        batch, self.position = next(self._items)
        return {name: tensor.to(self._device, non_blocking=True) for name, tensor in batch.items()}


def pin_batches(items: Iterable[tuple[Batch, dict[str, Any]]]) -> Iterator[tuple[Batch, dict[str, Any]]]:
    """The same in pinned memory, from where a GPU takes them without anybody waiting."""
    for batch, position in items:
        yield {name: tensor.pin_memory() for name, tensor in batch.items()}, position


def collate_batches(rows: Iterable[Batch], batch_size: int) -> Iterator[Batch]:
    """Batches (B, T) of rows (T,); the last can be smaller."""
    iterator = iter(rows)
    while batch := list(islice(iterator, batch_size)):
        yield default_collate(batch)

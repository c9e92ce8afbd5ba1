"""Which rows of which documents made a loss or a gradient that is not finite?"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from chatmodel.data.rows import PackedRows
from chatmodel.losses import LanguageModelLoss
from chatmodel.train_step import TrainStep
from chatmodel.training.loading import Batch


@dataclass(frozen=True)
class BadRow:
    """The address of a row: where it was computed, and which tokens of the store it holds."""

    rank: int
    micro_batch: int
    row: int
    documents: list[int]
    spans: list[tuple[int, int]]

    def describe(self) -> str:
        """Half a sentence."""
        documents = ", ".join(str(number) for number in self.documents[:8])
        return (
            f"rank {self.rank}, micro-batch {self.micro_batch}, row {self.row} (documents {documents}"
            f"{', ...' if len(self.documents) > 8 else ''}; tokens {self.spans[0][0]} to {self.spans[-1][1]})"
        )


def find_bad_rows(step: TrainStep, rows: PackedRows, position: dict[str, Any], *, batch_size: int) -> list[BadRow]:
    """Run this rank's micro-batches of a step again, one by one, from the step's `position`.

    In a micro-batch whose loss or gradient is not finite, the rows are run alone; if each is finite there, or weights
    are divided among ranks, so that a rank can do nothing alone, all its rows are named. Changes where `rows` stand.
    """
    rows.load_state_dict(position)
    batches = rows.batches(batch_size)
    bad: list[tuple[int, int]] = []
    for micro_batch in range(step.accumulation):
        batch = {name: tensor.to(step.accelerator.device) for name, tensor in next(batches)[0].items()}
        if not is_finite(step, batch):
            everywhere = range(batch_size)
            alone = [] if step.divided else [row for row in everywhere if not is_row_finite(step, batch, row)]
            bad += [(micro_batch, row) for row in alone or everywhere]
    rows.load_state_dict(position)
    return locate(rows, bad, batch_size=batch_size)


def is_finite(step: TrainStep, batch: Batch) -> bool:
    """Whether a micro-batch's loss and gradient are, by the same kernels as in training."""
    loss = step.accumulate(batch)
    gradients = [parameter.grad for parameter in step.model.parameters() if parameter.grad is not None]
    finite = bool(loss.isfinite()) and all(bool(gradient.isfinite().all()) for gradient in gradients)
    step.drop()
    return finite


def is_row_finite(step: TrainStep, batch: Batch, row: int) -> bool:
    """Whether one row's loss and gradient are, without the compiled model, which would be compiled anew for it."""
    with step.evaluating() as model, torch.enable_grad():
        ids, labels = (batch[name][row : row + 1] for name in ("input_ids", "shift_labels"))
        loss = LanguageModelLoss(model)(ids, labels)
        weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
    found = [loss, *(gradient for gradient in gradients if gradient is not None)]
    return all(bool(tensor.isfinite().all()) for tensor in found)


def locate(rows: PackedRows, bad: Sequence[tuple[int, int]], *, batch_size: int) -> list[BadRow]:
    """The addresses of some (micro-batch, row), from where `rows` stand at the beginning of the step."""
    found: list[BadRow] = []
    wanted = {micro_batch * batch_size + row: (micro_batch, row) for micro_batch, row in bad}
    for number in range(max(wanted, default=-1) + 1):
        spans = [rows.plan.next_row() for _ in range(rows.world_size)][rows.rank] or []
        if number in wanted:
            starts = [start for start, _ in spans]
            documents = np.searchsorted(rows.store.offsets, starts, side="right") - 1
            found.append(BadRow(rows.rank, *wanted[number], documents.tolist(), list(spans)))
    return found


def describe_bad_rows(bad: Sequence[BadRow], *, rows_of_step: int) -> str:
    """What the addresses of all ranks together say, as a part of a sentence."""
    if not bad:
        return "each micro-batch run again is finite, so it cannot be repeated: suspect the hardware"
    if len(bad) == rows_of_step:
        return f"every row of the step does it, the first being {bad[0].describe()}: suspect the weights, not the data"
    more = f", and {len(bad) - 1} more" if len(bad) > 1 else ""
    return f"it comes from {bad[0].describe()}{more}"


def as_records(bad: Sequence[BadRow]) -> list[dict[str, Any]]:
    """The addresses as plain values."""
    return [asdict(row) for row in bad]

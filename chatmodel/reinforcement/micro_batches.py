"""Which tokens of a completion are trained, and how are scored completions divided into micro-batches?"""

from collections.abc import Sequence
from typing import Any

import torch

from chatmodel.generation import mask_calculator_output

Batch = dict[str, Any]


def mask_choices(ids: Sequence[int], table: dict[str, Any], ends: Sequence[int], *, train_end: bool) -> list[int]:
    """1 for each id of a completion that is trained: not the calculator's, and its end only with `train_end`.

    nanochat's engine drops the end token, so its RL never teaches when to stop; ours does by default.
    """
    mask = mask_calculator_output(ids, table)
    if ids and ids[-1] in ends and not train_end:
        mask[-1] = 0
    return mask


def split_rows(batch: Batch, rows: Sequence[int], parts: int) -> list[Batch]:
    """Rows of a scored batch as `parts` micro-batches without columns of mere padding; {} where nothing is left.

    They are filled in order, as full as the whole batch would have filled them, and the last ones are used: in the
    last of a step the ranks exchange gradients.

    Args:
        batch: TRL's: tensors whose first dimension is the row; prompts are padded on the left.
    """
    count = len(batch["completion_ids"])
    size = -(-count // parts)
    prompt_widths = batch["prompt_mask"].sum(1).tolist()
    # What lies behind the last token of any row is padding, even where the mask of a row is all 0.
    pads = batch["completion_mask"].flip(1).cumsum(1).eq(0).sum(1).tolist()
    width = batch["completion_ids"].shape[1]
    chunks = [list(rows[begin : begin + size]) for begin in range(0, len(rows), size)]
    micro_batches: list[Batch] = [{} for _ in range(parts - len(chunks))]
    for chunk in chunks:
        index = torch.tensor(chunk, device=batch["completion_ids"].device)
        part = {
            key: value[index] if torch.is_tensor(value) and value.ndim and len(value) == count else value
            for key, value in batch.items()
        }
        prompt_width = max(prompt_widths[row] for row in chunk)
        completion_width = max(1, *(width - pads[row] for row in chunk))
        for key, value in part.items():
            if not torch.is_tensor(value) or value.ndim != 2:
                continue
            part[key] = value[:, -prompt_width:] if key.startswith("prompt_") else value[:, :completion_width]
        micro_batches.append(part)
    return micro_batches

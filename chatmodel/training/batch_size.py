"""How many rows can a device hold at once? Found by trying, or on a CPU by an estimate."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace

import psutil
import torch

from chatmodel.devices import describe_device
from chatmodel.estimate.memory import MEMORY_FACTOR, largest_batch
from chatmodel.estimate.setup import Setup
from chatmodel.runtime import UserError, logger
from chatmodel.scaling import RunPlan
from chatmodel.train_step import TrainStep
from chatmodel.training.ranks import Ranks

# Bytes a parameter that the first update will still ask for: its masters and momenta in fp32.
OPTIMIZER_BYTES = 12


def fit_device_batch_size(plan: RunPlan, asked: int, world_size: int) -> int:
    """The rows asked for, or the most below that divide a rank's part of a step, which is then logged."""
    rows = plan.fit_rows(asked, world_size)
    if rows != asked:
        logger.info(
            "device_batch_size: %d in place of %d, as a step has %d rows for each of %d process(es)",
            rows,
            asked,
            plan.rank_rows(world_size),
            world_size,
        )
    return rows


def choose_device_batch_size(
    step: TrainStep, ranks: Ranks, *, compiled: bool, document_capacity: Callable[[int], int] | None = None
) -> int:
    """The most rows, a power of two, that every rank can hold; what was found is logged.

    Args:
        document_capacity: where documents are kept apart, the documents that so many rows have room for.

    Raises:
        UserError: not even one row fits.
    """
    candidates = list_candidates(step.plan, ranks.count)
    guess = guess_rows(step, ranks, compiled=compiled)
    on_cuda = ranks.device.type == "cuda"
    # A CPU has no error to catch: the system kills the process, or another.
    found = ranks.minimum(
        find_largest(candidates, lambda size: try_rows(step, size, document_capacity), guess=guess)
        if on_cuda
        else guess
    )
    if not found:
        raise UserError(
            f"auto_batch: not even one row of {step.plan.sequence_length} tokens fits into the memory of "
            f"{ranks.device}; lower depth or sequence_length"
        )
    logger.info(
        "auto_batch: %d rows a device at once, %d micro-batches a step%s",
        found,
        step.plan.accumulation_steps(found, ranks.count),
        "" if found < candidates[-1] else ", for a step has no more",
    )
    return found


def list_candidates(plan: RunPlan, world_size: int) -> list[int]:
    """The powers of two that divide the rows of each rank's part of a step, smallest first."""
    rows = plan.rank_rows(world_size)
    return [1 << power for power in range(rows.bit_length()) if rows % (1 << power) == 0]


def find_largest(candidates: Sequence[int], fits: Callable[[int], bool], *, guess: int) -> int:
    """The largest candidate that fits, 0 if none does; tries outwards from `guess`, as each trial can be slow."""
    start = max((index for index, size in enumerate(candidates) if size <= guess), default=0)
    if fits(candidates[start]):
        best = start
        while best + 1 < len(candidates) and fits(candidates[best + 1]):
            best += 1
        return candidates[best]
    return next((size for size in reversed(candidates[:start]) if fits(size)), 0)


def guess_rows(step: TrainStep, ranks: Ranks, *, compiled: bool) -> int:
    """The most rows by the estimate of `chatmodel.estimate`, for the memory that this rank has now; 0 if none fits."""
    device = ranks.device
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_allocated(device)
    else:
        free = psutil.virtual_memory().available // ranks.count + psutil.Process().memory_info().rss
    setup = Setup(
        device=replace(describe_device(device), memory_bytes=int(free / MEMORY_FACTOR)),
        precision=step.accelerator.mixed_precision,
        compiled=compiled,
        device_batch_size=1,
        num_devices=ranks.count,
    )
    return largest_batch(step.plan, setup) or 0


def try_rows(step: TrainStep, size: int, document_capacity: Callable[[int], int] | None = None) -> bool:
    """Whether one micro-batch of `size` rows fits on this rank's CUDA device; nothing is left of it."""
    device = step.accelerator.device
    capacity = None if document_capacity is None else document_capacity(size)
    batch = draw_batch(step, size, capacity)
    num_parameters = sum(parameter.numel() for parameter in step.model.parameters())
    try:
        ballast = torch.empty(OPTIMIZER_BYTES * num_parameters, dtype=torch.uint8, device=device)
        step.accumulate({name: tensor.to(device) for name, tensor in batch.items()})
        torch.cuda.synchronize(device)
        del ballast
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        step.drop()
        gc.collect()
        torch.cuda.empty_cache()


def draw_batch(step: TrainStep, size: int, document_capacity: int | None) -> dict[str, torch.Tensor]:
    """A micro-batch of random tokens in the shapes of training; with room for documents, of one in each row."""
    length = step.plan.sequence_length
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(step.model.config.vocab_size, (size, length), generator=generator)
    batch = {"input_ids": ids, "shift_labels": ids}
    if document_capacity is not None:
        batch["document_starts"] = torch.full((document_capacity + 1,), size * length, dtype=torch.int32)
        batch["document_starts"][:size] = torch.arange(size) * length
    return batch

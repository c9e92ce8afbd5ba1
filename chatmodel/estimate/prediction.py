"""What does a plan cost on a device, is there room for it, and what has it cost in the end?"""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from chatmodel.estimate.memory import (
    MEMORY_FACTOR,
    checkpoint_bytes,
    largest_batch,
    peak_bytes,
    predict_disk,
    predict_memory,
    validation_bytes,
)
from chatmodel.estimate.setup import Setup
from chatmodel.estimate.speed import DEVICE_SHARE, Speed, predict_speed
from chatmodel.runs import Run
from chatmodel.runtime import UserError, logger
from chatmodel.scaling import RunPlan

FORWARD_SHARE = 0.4  # of a training token's time: a third of the FLOPs, less well used
COMPILE_SECONDS = 90.0  # to the end of the first step; 51 to 64 s on an H200 (docs/experiments.md), and more elsewhere
# Bytes of text a second and core with tiktoken (docs/experiments.md: 17.8 MB on two); more than 16 are not counted on.
TOKENIZER_BYTES_PER_SECOND, TOKENIZER_CORES = 9e6, 16
DISK_WARNING_SHARE = 0.8


@dataclass(frozen=True)
class Prediction:
    """What a run is expected to take; the truth is expected within `factor` either way, memory within 1.25.

    Args:
        seconds: by what they are spent on. memory: bytes of one device, not all held at once. disk: bytes.
        disk_bytes: the most at a time. disk_kept_bytes: what is left when the run is finished.
    """

    device: str
    num_devices: int
    precision: str
    device_batch_size: int
    basis: str
    factor: float
    tokens_per_second: float
    mfu: float | None
    seconds: dict[str, float]
    total_seconds: float
    hourly_rate: float | None
    cost: float | None
    memory: dict[str, int]
    peak_memory_bytes: int
    memory_limit_bytes: int
    disk: dict[str, int]
    disk_bytes: int
    disk_kept_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """Plain values for the run's results."""
        return asdict(self)


def predict_run(plan: RunPlan, setup: Setup, *, speed: Speed | None = None) -> Prediction:
    """What a plan will take in a setup; every rank calls this, as finding the speed may take a step.

    Args:
        speed: if it is known better than `predict_speed` would find it.
    """
    speed = predict_speed(plan, setup) if speed is None else speed
    rate = tokens_per_second(plan, setup, speed)
    seconds = predict_seconds(plan, setup, rate)
    total = sum(seconds.values())
    memory, disk = predict_memory(plan, setup), predict_disk(plan, setup)
    sheet, measured = setup.device.datasheet, speed.peak_memory_bytes
    peak = peak_bytes(memory) if measured is None else max(measured, validation_bytes(memory))
    return Prediction(
        device=setup.device.name,
        num_devices=setup.num_devices,
        precision=setup.precision,
        device_batch_size=setup.device_batch_size,
        basis=speed.basis,
        factor=speed.factor,
        tokens_per_second=rate,
        mfu=None if sheet is None else rate * plan.flops_per_token / (sheet.flops * setup.num_devices),
        seconds=seconds,
        total_seconds=total,
        hourly_rate=setup.hourly_rate,
        cost=None if setup.hourly_rate is None else total / 3600 * setup.hourly_rate,
        memory=memory,
        peak_memory_bytes=peak,
        memory_limit_bytes=setup.device.memory_bytes,
        disk=disk,
        disk_bytes=sum(disk.values()),
        disk_kept_bytes=sum(disk.values()) - checkpoint_bytes(plan, setup),
    )


def tokens_per_second(plan: RunPlan, setup: Setup, speed: Speed) -> float:
    """Training tokens a second of all devices, updates included."""
    share = DEVICE_SHARE if setup.num_devices > 1 else 1.0
    step = plan.total_batch_tokens / setup.num_devices * speed.token_seconds / share + speed.update_seconds
    return plan.total_batch_tokens / step


def predict_seconds(plan: RunPlan, setup: Setup, rate: float) -> dict[str, float]:
    """Wall-clock seconds by what they are spent on; estimates of CORE on the way are not foreseen."""
    measurements = 1 + -(-plan.steps // setup.eval_every)  # before the first step, now and then, after the last
    text_bytes = setup.store_share * plan.train_tokens * bytes_per_token(plan.model["vocab_size"])
    cores = min(setup.cores, TOKENIZER_CORES)
    return {
        "tokenizing": 0.0 if setup.data_is_ready else text_bytes / (TOKENIZER_BYTES_PER_SECOND * cores),
        "compiling": COMPILE_SECONDS if setup.compiled else 0.0,
        "training": plan.train_tokens / rate,
        "validation": measurements * setup.eval_tokens * FORWARD_SHARE / rate,
    }


def bytes_per_token(vocab_size: int) -> float:
    """Of English text: 3.31 measured with a vocabulary of 2,048, 4.45 with 32,768, linear in its logarithm."""
    return 3.31 + (4.45 - 3.31) * (vocab_size.bit_length() - 12) / 4


def check_resources(plan: RunPlan, setup: Setup, prediction: Prediction, run: Run) -> None:
    """Refuse what clearly cannot work, and warn where it may not; the disk counts only for a device that is here.

    Raises:
        UserError: the device's memory, or the disk of the run, is too small.
    """
    _check_memory(plan, setup, prediction)
    if setup.device.present is not None:
        _check_disk(prediction, run)


def _check_memory(plan: RunPlan, setup: Setup, prediction: Prediction) -> None:
    peak, limit = prediction.peak_memory_bytes, prediction.memory_limit_bytes
    if peak * MEMORY_FACTOR <= limit:
        if setup.device.kind == "cpu" and peak > psutil.virtual_memory().available:
            logger.warning("only %s of memory are free now; %s are needed", _gib(_available()), _gib(peak))
        return
    rows = largest_batch(plan, setup)
    advice = (
        f"set device_batch_size to {rows} (the rows of a step stay the same)"
        if rows is not None and rows < setup.device_batch_size
        else "lower depth or sequence_length, or divide the model among several GPUs with FSDP"
    )
    text = f"device_batch_size={setup.device_batch_size} needs about {_gib(peak)} of memory, and the "
    text += f"{prediction.device} has {_gib(limit)}"
    if peak / MEMORY_FACTOR > limit:
        raise UserError(f"{text}: {advice}")
    logger.warning("%s, which may not be enough; if it is not, %s", text, advice)


def _check_disk(prediction: Prediction, run: Run) -> None:
    free = free_disk_bytes(run.run_dir)
    needed = prediction.disk_bytes - measure_disk(run)
    parts = ", ".join(f"{name} {_gib(size)}" for name, size in prediction.disk.items())
    if needed > free:
        raise UserError(
            f"the run needs about {_gib(needed)} on the disk of {run.run_dir}, where {_gib(free)} are free ({parts}): "
            "free some space or choose another run_dir"
        )
    if needed > DISK_WARNING_SHARE * free:
        logger.warning("the run will take %s of the %s that are free on the disk", _gib(needed), _gib(free))


def free_disk_bytes(folder: Path) -> int:
    """Free space where a folder lies, or will lie."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def measure_disk(run: Run) -> int:
    """Bytes that pretraining has on the disk: token store, checkpoints, model."""
    folders = (run.folder("data"), run.checkpoints("base"), run.folder("base"))
    return sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())


def _available() -> int:
    return int(psutil.virtual_memory().available)


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 10 * 2**30 else f"{size / 2**20:,.0f} MiB"

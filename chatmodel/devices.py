"""Which device, in which precision, how fast, and how much does it hold: by its datasheet, or found by trying?"""

import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from chatmodel.runtime import UserError, logger

QUEUED_CALLS = 20
CYCLES_PER_SECOND = 3e9  # of a GPU; where there are fewer, its pauses are longer
CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


@dataclass(frozen=True)
class Datasheet:
    """What is published of a GPU, and which share of it the products of a small model reach.

    Args:
        flops: dense bf16 products with fp32 sums, a second.
        bytes_per_second: to and from its memory.
        memory_bytes: as PyTorch reports it, a little less than on the box.
        matmul_share: share of `flops` that products of width 768 reach. Server cards lose more on small products than
            gaming cards, whose rate is far lower for the same memory.
        has_fp8: whether it multiplies 8-bit floats.
    """

    flops: float
    bytes_per_second: float
    memory_bytes: int
    matmul_share: float
    has_fp8: bool = True


# The first name that occurs in the device's name counts. The H200's share is measured (docs/experiments.md: 590 to 662
# TFLOP/s for 768 x 768 to 768 x 3072); the RTX 5090's is what its 77 % over a whole run needs (the seed report); the
# others are taken to be like the nearest of the two.
DATASHEETS = {
    "H200": Datasheet(989e12, 4.8e12, int(139.8 * 2**30), 0.63),
    "H100": Datasheet(989e12, 3.35e12, int(79.1 * 2**30), 0.63),
    "B200": Datasheet(2250e12, 8.0e12, 178 * 2**30, 0.55),
    "A100": Datasheet(312e12, 2.04e12, int(79.1 * 2**30), 0.75, has_fp8=False),
    "L40S": Datasheet(362e12, 0.864e12, int(44.4 * 2**30), 0.6),
    "RTX 5090": Datasheet(209.5e12, 1.79e12, int(31.4 * 2**30), 0.9),
    "RTX 4090": Datasheet(165.2e12, 1.01e12, int(23.5 * 2**30), 0.9),
    "RTX 3090": Datasheet(71e12, 0.936e12, int(23.6 * 2**30), 0.9, has_fp8=False),
}
COPY_SHARE = 0.88  # of the datasheet's bytes a second that a copy reaches: 4.24 of 4.8 TB/s measured on the H200


@dataclass(frozen=True)
class Device:
    """A device to plan for: `present` is None if it is another machine's."""

    name: str
    memory_bytes: int
    datasheet: Datasheet | None
    present: torch.device | None

    @property
    def kind(self) -> str:
        """ "cuda", "mps" or "cpu"."""
        return "cuda" if self.present is None else self.present.type


def find_datasheet(name: str) -> Datasheet | None:
    """The datasheet of a GPU by (part of) its name; None if it is not known."""
    return next((sheet for key, sheet in DATASHEETS.items() if key.lower() in name.lower()), None)


def describe_device(device: torch.device) -> Device:
    """What is known of a device of this machine."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return Device(properties.name, properties.total_memory, find_datasheet(properties.name), device)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # which torchrun starts on this machine
    return Device("Apple MPS" if device.type == "mps" else "CPU", host_memory_bytes() // processes, None, device)


def describe_named(name: str) -> Device:
    """A device of another machine.

    Raises:
        UserError: its datasheet is not known here.
    """
    sheet = find_datasheet(name)
    if sheet is None:
        raise UserError(f"device_name={name!r} is not known; choose one of {', '.join(DATASHEETS)}")
    return Device(name, sheet.memory_bytes, sheet, None)


def host_memory_bytes() -> int:
    """Memory of this machine, or what the container may use of it."""
    limits = [psutil.virtual_memory().total]
    for path in CGROUP_LIMITS:
        try:
            limits.append(int(path.read_text()))
        except (OSError, ValueError):  # no such file, or the word "max"
            continue
    return min(limits)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def time_call(work: Callable[[], object], device: torch.device) -> float:
    """Seconds until the device has done what it is given."""
    synchronize(device)
    began = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - began


def time_fastest(work: Callable[[], object], device: torch.device, *, repeats: int = 5) -> float:
    """Seconds of the fastest of some calls, after one that does not count."""
    return min([time_call(work, device) for _ in range(repeats + 1)][1:])


def time_repeated(work: Callable[[], object], device: torch.device, *, repeats: int = 5) -> float:
    """Seconds of a call among many; of a GPU those it works, however long the host takes to hand a call over.

    A step of training has the host far ahead of the GPU, so that only the latter's time counts there. Here a pause of
    the GPU lets the host get ahead.

    Args:
        repeats: as `time_fastest`.
    """
    if device.type != "cuda":
        return time_fastest(work, device, repeats=repeats)
    time_call(work, device)  # which may compile
    fastest, handing_over = _time_queued(work, device, pause=0.0)
    for _ in range(repeats):
        fastest = min(fastest, _time_queued(work, device, pause=1.5 * handing_over)[0])
    return fastest / QUEUED_CALLS


def _time_queued(work: Callable[[], object], device: torch.device, *, pause: float) -> tuple[float, float]:
    """Seconds of `QUEUED_CALLS` calls on the GPU, which rests for `pause` seconds before them, and on the host."""
    with torch.cuda.device(device):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        torch.cuda._sleep(int(pause * CYCLES_PER_SECOND))  # type: ignore[no-untyped-call]
        begin.record()
        began = time.perf_counter()
        for _ in range(QUEUED_CALLS):
            work()
        handing_over = time.perf_counter() - began
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000, handing_over


@torch.no_grad()
def measure_matmul(device: torch.device, dtype: torch.dtype, sizes: tuple[int, int, int]) -> float:
    """FLOPs a second of the product of a (rows, inner) and a (inner, columns) matrix."""
    rows, inner, columns = sizes
    left = torch.randn(rows, inner, device=device).to(dtype)
    right = torch.randn(columns, inner, device=device).to(dtype)
    return 2.0 * rows * inner * columns / time_repeated(lambda: left @ right.T, device)


@torch.no_grad()
def measure_copy(device: torch.device) -> float:
    """Bytes a second, read and written, of a copy within the device's memory."""
    source = torch.ones(2**28 if device.type == "cuda" else 2**24, device=device)
    target = torch.empty_like(source)
    return 2.0 * source.nbytes / time_repeated(lambda: target.copy_(source), device)


def choose_device() -> torch.device:
    """The best device of this process: CUDA (its local rank), then Apple's MPS, then the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def choose_precision(device: torch.device, asked: str | None = None) -> str:
    """ "bf16" or "no" (fp32): what was asked for, else bf16 where this device is faster with it.

    Accelerate's own setting is not looked at, since `accelerate launch` sets "no" where nobody asked; if the choice is
    another one, the log says so.

    Raises:
        UserError: something else was asked for.
    """
    if asked not in (None, "bf16", "no"):
        raise UserError(f"mixed_precision={asked!r} must be 'bf16' or 'no'; leave it out to let the device decide")
    if asked is not None:
        return asked
    if device.type == "cuda":
        chosen = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    else:
        chosen = "bf16" if device.type == "cpu" and _has_fast_bf16() else "no"
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", chosen)
    hint = f", not Accelerate's '{launched}', which does not count: this program's own --mixed_precision does"
    named = "bf16" if chosen == "bf16" else "fp32"
    logger.info("precision: %s on %s%s", named, device.type, hint if launched != chosen else "")
    return chosen


def _has_fast_bf16() -> bool:
    """Whether this CPU has instructions for bf16; where PyTorch cannot say, whether it multiplies faster in it.

    By the clock only then: other programs disturb it, and a run must go on in the precision it began in.
    """
    found = torch.cpu.get_capabilities()
    if "avx512_bf16" in found:  # an x86
        return bool(found["avx512_bf16"] or found.get("amx_bf16"))
    return _matmul_speedup(torch.bfloat16) > 1.3


def _matmul_speedup(dtype: torch.dtype) -> float:
    """How many times faster this CPU multiplies matrices of `dtype` than of fp32; some emulate bf16 slowly."""
    factors = torch.randn(512, 512), torch.randn(512, 1024)
    fastest = dict.fromkeys((torch.float32, dtype), math.inf)
    for _ in range(10):
        for kind in fastest:  # by turns, so that a disturbance meets both
            left, right = (factor.to(kind) for factor in factors)
            fastest[kind] = min(fastest[kind], time_call(lambda: left @ right, torch.device("cpu")))  # noqa: B023
    return fastest[torch.float32] / fastest[dtype]


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory used so far: of the CUDA device, else the resident set of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # no such module on Windows
        return int(psutil.Process().memory_info().rss)
    unit = 1 if sys.platform == "darwin" else 1024  # macOS reports bytes, Linux kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

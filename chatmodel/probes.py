"""Which of the fast paths work on this machine, and how fast? Each is tried once, on a small case."""

import hashlib
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset

from chatmodel.attention import AttentionShape, Trial, choose_by_rule, leave_out_compiled, try_attention
from chatmodel.devices import find_datasheet, measure_copy, measure_matmul, time_call, time_fastest
from chatmodel.kernels.fp8 import build_fp8_converter, check_fp8
from chatmodel.kernels.mlp import compare_mlps, find_obstacle
from chatmodel.losses import LanguageModelLoss
from chatmodel.model import GPTForCausalLM
from chatmodel.runtime import UserError, logger
from chatmodel.scaling import plan_run
from chatmodel.train_step import TrainStep

HASHED_BYTES = 2**26
FP8_TOLERANCE = 0.1  # three bits of mantissa leave about 0.04
TINY = {"vocab_size": 512, "sequence_length": 128, "head_dim": 32, "total_batch_tokens": 512, "max_steps": 10}


@dataclass(frozen=True)
class Probe:
    """What trying something showed: whether it works, and in words how well, or why not."""

    name: str
    works: bool
    text: str


def run_probe(name: str, work: Callable[[], str]) -> Probe:
    """Try something that says how it went, or fails in any way."""
    try:
        return Probe(name, True, work())
    except Exception as error:  # a probe is there to find out what fails
        message = next(iter(str(error).strip().splitlines()), "")[:200]
        return Probe(name, False, f"fails: {type(error).__name__}{': ' if message else ''}{message}")


def probe_device(device: torch.device, dtype: torch.dtype) -> Iterable[Probe]:
    """Everything that concerns the device that trains, one after the other."""
    yield run_probe("matrix products", lambda: _products(device))
    yield run_probe("copy", lambda: f"{measure_copy(device) / 1e9:,.0f} GB a second, read and written")
    yield from probe_attention(device, dtype)
    yield run_probe("MLP", lambda: _fuse_mlp(device, dtype))
    yield run_probe("fp8", lambda: _multiply_in_fp8(device))
    yield run_probe("loss", lambda: _loss(device, dtype))
    yield run_probe("torch.compile", lambda: _compile(device))
    yield run_probe("training step", lambda: _train(device, dtype))


def probe_host() -> Iterable[Probe]:
    """Everything that does not concern the device."""
    yield run_probe("DataLoader", _load)
    yield run_probe("SHA-256", _hash)
    backends = ["gloo", *(["nccl"] if torch.cuda.is_available() else [])]
    for backend in backends:
        yield run_probe(f"processes, {backend}", lambda backend=backend: _reduce(backend))  # type: ignore[misc]


def probe_attention(device: torch.device, dtype: torch.dtype) -> list[Probe]:
    """Every attention kernel on full rows, on windowed ones and within documents, and which of them training takes."""
    length, heads, head_dim, batch = (2048, 6, 128, 8) if device.type == "cuda" else (512, 4, 64, 2)
    probes = []
    for name, window, apart in (("full", None, False), ("windowed", length // 4, False), ("documents", None, True)):
        shape = AttentionShape(batch, heads, length, head_dim, window, documents_apart=apart)
        trials = try_attention(shape, device, dtype)
        used, reason = _choose_trial(shape, trials, device)
        size = f"{batch} x {length} tokens, {heads} heads of {head_dim}"
        text = f"{used.name}, {_describe_trial(used)} for {size} (used: {reason})"
        probes.append(Probe(f"attention, {name}", used.milliseconds is not None, text))
        for trial in trials:
            works = trial.milliseconds is not None
            # What does not work elsewhere is not meant to.
            if trial is not used and (works or device.type == "cuda"):
                probes.append(Probe(f"  {trial.name}", works, _describe_trial(trial)))
    return probes


def _choose_trial(shape: AttentionShape, trials: list[Trial], device: torch.device) -> tuple[Trial, str]:
    """The kernel that training takes if nothing else is asked for, and why, as `choose_attention` would."""
    if device.type != "cpu":
        return leave_out_compiled(trials, compiled=device.type == "cuda")[0], "the fastest"
    name = choose_by_rule(shape, compiled=False)
    return next(trial for trial in trials if trial.name == name), "by rule, a CPU's clock being disturbed by others"


def _describe_trial(trial: Trial) -> str:
    return trial.reason if trial.milliseconds is None else f"{trial.milliseconds:.2f} ms"


def _fuse_mlp(device: torch.device, dtype: torch.dtype) -> str:
    """ReLU^2 within the products of the MLP, beside plain ones, in the sizes of depth 12."""
    obstacle = find_obstacle(device, dtype)
    if obstacle is not None:
        return f"plain matrix products (used: the fused kernel {obstacle})"
    rows, width, inner = 16_384, 768, 3072
    _, found = compare_mlps(rows=rows, width=width, inner=inner, device=device)
    return f"{found} for {rows:,} tokens of {width} to {inner} channels (used)"


def _multiply_in_fp8(device: torch.device) -> str:
    """A linear layer in 8-bit floats beside the same in bf16, compiled, forward and backward."""
    try:
        check_fp8(device, compiled=True, divided=False)
    except UserError as error:
        return f"not available: {error}"
    linear = torch.nn.Linear(1024, 4096, bias=False, device=device, dtype=torch.bfloat16)
    states = torch.randn(16_384, 1024, device=device, dtype=torch.bfloat16)
    outputs, milliseconds = [], []
    for layer in (linear, build_fp8_converter()(linear)):
        compiled = torch.compile(layer, dynamic=False)
        outputs.append(compiled(states).detach().float())
        seconds = time_fastest(lambda compiled=compiled: compiled(states).sum().backward(), device, repeats=2)  # type: ignore[misc]
        milliseconds.append(1000 * seconds)
    difference = float((outputs[1] - outputs[0]).norm() / outputs[0].norm())
    if not difference <= FP8_TOLERANCE:
        raise ArithmeticError(f"relative error {difference:.3g} against bf16")
    return (
        f"works (only with --fp8), {milliseconds[1]:.2f} ms, bf16 {milliseconds[0]:.2f} ms for 16,384 tokens of 1024 "
        "to 4096 channels"
    )


def _products(device: torch.device) -> str:
    sizes = (8192, 4096, 4096) if device.type == "cuda" else (1024, 768, 768)
    found = []
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        rate = measure_matmul(device, dtype, sizes)
        found.append(f"{name} {rate / 1e12:,.3g} TFLOP/s")
    sheet = find_datasheet(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return ", ".join(found) + (f" (datasheet: bf16 {sheet.flops / 1e12:,.0f})" if sheet is not None else "")


def _loss(device: torch.device, dtype: torch.dtype) -> str:
    """The training loss beside the model's own, which must be the same."""
    model = _tiny_model(device, dtype)
    ids = _tiny_ids(4, device)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits.float()
        true = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())
    module = LanguageModelLoss(model)
    loss = module(ids, ids)
    found, expected = loss.item(), true.item()
    if not abs(found - expected) < 0.02:
        raise ArithmeticError(f"{found:.4f} nats instead of {expected:.4f}")
    seconds = time_fastest(lambda: module(ids, ids).backward(), device, repeats=2)
    kind = "one kernel (Triton)" if device.type == "cuda" else "plain PyTorch"
    return f"{kind}, right to 0.02 nats, {1000 * seconds:.1f} ms for {ids.numel()} tokens of a tiny model"


def _compile(device: torch.device) -> str:
    if device.type != "cuda":
        compiler = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
        return f"not used on {device.type}, not tried (C++ compiler: {compiler or 'none found'})"
    function = torch.compile(lambda x: (x * 2 + 1).relu().square(), dynamic=False)
    states = torch.ones(1024, device=device)
    seconds = time_call(lambda: function(states), device)
    if not torch.equal(function(states), torch.full_like(states, 9)):
        raise ArithmeticError("a compiled function gave a wrong result")
    return f"works, {seconds:.1f} s for a tiny function"


def _train(device: torch.device, dtype: torch.dtype) -> str:
    """Ten steps of a tiny model on one batch: finite, and learning."""
    precision = "bf16" if dtype == torch.bfloat16 else "no"
    accelerator = Accelerator(mixed_precision=precision, cpu=device.type == "cpu")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        model = _tiny_model(device, torch.float32)
        step = TrainStep(model, plan_run(2, **TINY), accelerator, device_batch_size=4, compile=False)  # type: ignore[arg-type]
    finally:
        logger.setLevel(level)
    ids = _tiny_ids(4, device)
    losses = []
    began = time.perf_counter()
    for number in range(10):
        step.accumulate({"input_ids": ids, "shift_labels": ids.roll(-1, dims=1)})
        result = step.finish(number)
        if not (result.updated and math.isfinite(result.gradient_norm)):
            raise ArithmeticError(f"loss {result.loss}, gradient {result.gradient_norm} in step {number}")
        losses.append(result.loss)
    if not losses[-1] < losses[0]:
        raise ArithmeticError(f"the loss went from {losses[0]:.3f} to {losses[-1]:.3f}")
    seconds = time.perf_counter() - began
    return f"ten steps of a tiny model in {seconds:.1f} s, all finite, loss {losses[0]:.2f} to {losses[-1]:.2f}"


def _tiny_model(device: torch.device, dtype: torch.dtype) -> GPTForCausalLM:
    plan = plan_run(2, **TINY)  # type: ignore[arg-type]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GPTForCausalLM(plan.model_config()).to(device, dtype)


def _tiny_ids(rows: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(TINY["vocab_size"], (rows, TINY["sequence_length"]), generator=generator).to(device)


class _Numbers(Dataset[int]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> int:
        return index


def _load() -> str:
    began = time.perf_counter()
    found = [int(number) for batch in DataLoader(_Numbers(), batch_size=8, num_workers=1) for number in batch]
    assert found == list(range(64)), found
    return f"a worker process delivers, {time.perf_counter() - began:.1f} s"


def _hash() -> str:
    content = bytes(HASHED_BYTES)
    seconds = time_call(lambda: hashlib.sha256(content).digest(), torch.device("cpu"))
    return f"{HASHED_BYTES / seconds / 1e9:.2f} GB a second, the speed at which checkpoints are checked"


def _reduce(backend: str) -> str:
    """A group of this process alone: whether the backend starts and answers."""
    if dist.is_initialized():
        return "in use"
    device = torch.device("cuda" if backend == "nccl" else "cpu")
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        number = torch.ones((), device=device)
        dist.all_reduce(number)
        return f"starts and adds up ({float(number):.0f} process)"
    finally:
        dist.destroy_process_group()

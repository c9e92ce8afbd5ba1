"""Which attention kernel trains fastest on this device? Every candidate is tried once, on the shapes of the run."""

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from chatmodel.devices import time_repeated
from chatmodel.kernels.attention import (
    Attention,
    DocumentAttention,
    attend_blocks,
    attend_cudnn,
    attend_dense,
    attend_documents_dense,
    attend_documents_flash_2,
    attend_documents_flash_3,
    attend_documents_flash_4,
    attend_flash_2,
    attend_flash_3,
    attend_flash_4,
    attend_flex,
    prepare_block_mask,
)
from chatmodel.kernels.attention_products import attend_documents_products, attend_products
from chatmodel.runtime import logger

TRAINING_ATTENTION = "chatmodel_training"  # the name Transformers knows it by
LONG = 1024  # from this length on, blocks pay on a CPU
TOLERANCE = 0.02  # greatest relative error of outputs and gradients against fp32; bf16 itself has about 0.004


@dataclass(frozen=True)
class Candidate:
    """A way to attend: on which device type, what must be importable, and how it keeps documents apart, if it can."""

    name: str
    attend: Attention
    device_type: str | None = None  # None: any
    package: str | None = None
    compiled: bool = False
    attend_documents: DocumentAttention | None = None


CANDIDATES = (
    Candidate("sdpa", attend_dense, attend_documents=attend_documents_dense),
    Candidate("blocks", attend_blocks),
    Candidate("products", attend_products, "cpu", attend_documents=attend_documents_products),
    Candidate("flash_attention_2", attend_flash_2, "cuda", attend_documents=attend_documents_flash_2),
    Candidate("cudnn", attend_cudnn, "cuda"),
    Candidate("flex", attend_flex, "cuda", compiled=True),
    Candidate(
        "flash_attention_3",
        attend_flash_3,
        "cuda",
        package="flash_attn_interface",
        attend_documents=attend_documents_flash_3,
    ),
    Candidate(
        "flash_attention_4",
        attend_flash_4,
        "cuda",
        package="flash_attn.cute",
        attend_documents=attend_documents_flash_4,
    ),
)


@dataclass(frozen=True)
class Trial:
    """What trying a candidate showed; `milliseconds` are of forward and backward, None where it did not work."""

    name: str
    milliseconds: float | None
    reason: str


@dataclass(frozen=True)
class AttentionShape:
    """The shape a choice is made for; `window` counts the query's own key, None sees all.

    With `documents_apart` no position sees an earlier document of its row.
    """

    batch: int
    heads: int
    sequence_length: int
    head_dim: int
    window: int | None
    documents_apart: bool = False


def try_attention(shape: AttentionShape, device: torch.device, dtype: torch.dtype) -> list[Trial]:
    """Run every candidate on random states of `shape`, forward and backward, checked against fp32, fastest first."""
    trials = [_try_candidate(candidate, shape, device, dtype) for candidate in CANDIDATES]
    return sorted(trials, key=lambda trial: math.inf if trial.milliseconds is None else trial.milliseconds)


def _try_candidate(candidate: Candidate, shape: AttentionShape, device: torch.device, dtype: torch.dtype) -> Trial:
    if candidate.device_type not in (None, device.type):
        return Trial(candidate.name, None, f"needs a {candidate.device_type} device")
    if candidate.package is not None and not _is_installed(candidate.package):
        return Trial(candidate.name, None, f"{candidate.package} is not installed")
    attend = torch.compile(candidate.attend, dynamic=False) if candidate.compiled else candidate.attend
    if shape.documents_apart:
        if candidate.attend_documents is None:
            return Trial(candidate.name, None, "does not keep documents apart")
        attend = partial(_attend_some_documents, candidate.attend_documents)
    try:
        if candidate.compiled:
            prepare_block_mask(shape.sequence_length, shape.window, device)
        error = _measure_error(attend, shape, device, dtype)
        if not error <= TOLERANCE:
            return Trial(candidate.name, None, f"is wrong here: relative error {error:.3g}")
        milliseconds = _measure_milliseconds(attend, shape, device, dtype)
    except Exception as failure:  # a kernel may fail in any way on a device its authors never saw
        reason = (str(failure).strip() or type(failure).__name__).splitlines()[0][:200]
        return Trial(candidate.name, None, f"fails here: {reason}")
    return Trial(candidate.name, milliseconds, "works")


def _attend_some_documents(
    attend: DocumentAttention,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    window: int | None,
) -> torch.Tensor:
    """With four documents a row, as a trial, and two that are empty behind them, as a batch's room may be."""
    batch, _, length, _ = query.shape
    starts = torch.arange(0, batch * length + 1, max(1, length // 4), device=query.device, dtype=torch.int32)
    starts = torch.cat((starts, starts.new_full((2,), batch * length)))
    return attend(query, key, value, scaling, window, starts)


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def _random_states(shape: AttentionShape, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """Queries, keys, values and a gradient, laid out as projections leave them: heads behind positions in memory."""
    generator = torch.Generator(device).manual_seed(0)
    size = (shape.batch, shape.sequence_length, shape.heads, shape.head_dim)
    return [torch.randn(size, generator=generator, device=device, dtype=dtype).transpose(1, 2) for _ in range(4)]


def _measure_error(attend: Any, shape: AttentionShape, device: torch.device, dtype: torch.dtype) -> float:
    """Greatest relative error of the output and of each gradient against fp32, on one row of the shape."""
    *states, gradient = _random_states(replace(shape, batch=1), device, dtype)
    results = []
    plain = partial(_attend_some_documents, attend_documents_dense) if shape.documents_apart else attend_dense
    cases: list[tuple[list[torch.Tensor], Any]] = [
        (states, attend),
        ([tensor.float() for tensor in states], plain),
    ]
    for inputs, function in cases:
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        output = function(*leaves, shape.head_dim**-0.5, shape.window)
        output.backward(gradient.to(output.dtype))
        results.append([output.detach(), *(leaf.grad for leaf in leaves)])
    pairs = zip(*results, strict=True)
    return max(float((got.float() - true).norm() / true.norm()) for got, true in pairs)


def _measure_milliseconds(attend: Any, shape: AttentionShape, device: torch.device, dtype: torch.dtype) -> float:
    """Of forward and backward, as in a step: a GPU has the next call's work before it has done this one's.

    Some kernels take the host long to start, which training hides.
    """
    *states, gradient = _random_states(shape, device, dtype)
    leaves = [tensor.requires_grad_() for tensor in states]

    def work() -> None:
        torch.autograd.grad(attend(*leaves, shape.head_dim**-0.5, shape.window), leaves, gradient)

    return 1000 * time_repeated(work, device, repeats=2)  # each start of a stage waits for this


class TrainingAttention:
    """The chosen kernel for full and for windowed layers, as an attention function of Transformers.

    It is for rows without padding, where every position counts: masks are not looked at.
    """

    def __init__(self, chosen: dict[int | None, Candidate]) -> None:
        self.chosen = chosen

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        scaling: float,
        sliding_window: int | None = None,
        document_starts: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """Args: states (B, heads, T, head_dim); returns (B, T, heads, head_dim) and no weights."""
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        chosen = self.chosen[sliding_window]
        if document_starts is None:
            return chosen.attend(query, key, value, scaling, sliding_window).transpose(1, 2), None
        assert chosen.attend_documents is not None
        output = chosen.attend_documents(query, key, value, scaling, sliding_window, document_starts)
        return output.transpose(1, 2), None


def choose_attention(
    shapes: Sequence[AttentionShape], device: torch.device, dtype: torch.dtype, *, compiled: bool
) -> dict[int | None, str]:
    """The fastest working kernel's name for each of `shapes`, by window; on a CPU, by a rule.

    Args:
        compiled: whether the model will be compiled.
    """
    chosen = {}
    for shape in shapes:
        if device.type == "cpu":
            chosen[shape.window] = choose_by_rule(shape, compiled=compiled)
            continue
        trials = leave_out_compiled(try_attention(shape, device, dtype), compiled=compiled)
        chosen[shape.window] = trials[0].name
        logger.info(
            "attention %s: %s (%s)",
            "over all positions" if shape.window is None else f"over {shape.window} positions",
            trials[0].name,
            ", ".join(f"{t.name} {t.milliseconds:.2f} ms" for t in trials if t.milliseconds is not None),
        )
    return chosen


def choose_by_rule(shape: AttentionShape, *, compiled: bool) -> str:
    """The kernel's name for a CPU; "products" are for PyTorch as it is.

    On a CPU other programs disturb the clock, and a run continued with another choice would differ in its last bits.
    """
    if not compiled:
        return "products"
    long = shape.window is not None and shape.sequence_length >= max(4 * shape.window, LONG)
    return "blocks" if long and not shape.documents_apart else "sdpa"


def leave_out_compiled(trials: Sequence[Trial], *, compiled: bool) -> list[Trial]:
    """Those of kernels that such a model can take: FlexAttention would hold all scores without being compiled."""
    needs_compiling = {candidate.name for candidate in CANDIDATES if candidate.compiled}
    return [trial for trial in trials if compiled or trial.name not in needs_compiling]


def works_here(name: str, shape: AttentionShape, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel of that name does its work on this device."""
    candidate = next(candidate for candidate in CANDIDATES if candidate.name == name)
    return _try_candidate(candidate, shape, device, dtype).milliseconds is not None


def use_attention(chosen: dict[int | None, str], *, length: int, device: torch.device) -> TrainingAttention:
    """Make the kernels of these names, by window, what `TRAINING_ATTENTION` stands for in Transformers."""
    by_name = {candidate.name: candidate for candidate in CANDIDATES}
    for window, name in chosen.items():
        if by_name[name].compiled:
            prepare_block_mask(length, window, device)
    attention = TrainingAttention({window: by_name[name] for window, name in chosen.items()})
    ALL_ATTENTION_FUNCTIONS.register(TRAINING_ATTENTION, attention)
    return attention

"""How are the loss and its gradient made from logits in one visit of the GPU's memory? (Needs Triton.)"""

import math

import torch
import triton
import triton.language as tl

BLOCK = 4096  # logits a program holds at a time; the second pass over a row finds it in the L2 cache
LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))


@triton.jit
def _tanh(x):
    # The hardware's own; its relative error of 2^-11 is a quarter of what rounding the logits to bf16 does.
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _load(pointer, index, vocab_size, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(pointer + index).to(tl.float32)
    return tl.load(pointer + index, mask=index < vocab_size, other=-float("inf")).to(tl.float32)


@triton.jit
def _cross_entropy(
    logits_pointer,
    targets_pointer,
    nats_pointer,
    vocab_size,
    cap,
    HAS_CAP: tl.constexpr,
    WRITE_GRADIENT: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row of logits. Powers are taken of 2, as the hardware does: the logits are scaled by log2(e)."""
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    logits_pointer += row.to(tl.int64) * vocab_size
    target = tl.load(targets_pointer + row)
    inverse_cap = 1.0 / cap
    scale = cap * LOG2_E if HAS_CAP else LOG2_E
    top = scale if HAS_CAP else -float("inf")  # nothing exceeds the cap, so it does for the maximum
    total = 0.0
    for begin in range(0, vocab_size, BLOCK):
        value = _load(logits_pointer, begin + columns, vocab_size, EVEN)
        if HAS_CAP:
            power = tl.exp2(_tanh(value * inverse_cap) * scale - top)
            if not EVEN:
                power = tl.where(begin + columns < vocab_size, power, 0.0)
            total += tl.sum(power)
        else:
            higher = tl.maximum(top, tl.max(value) * scale)
            total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(value * scale - higher))
            top = higher
    log_normalizer = tl.log2(total) + top
    scored = target >= 0
    at_target = tl.load(logits_pointer + tl.where(scored, target, 0)).to(tl.float32)
    if HAS_CAP:
        at_target = _tanh(at_target * inverse_cap)
    tl.store(nats_pointer + row, tl.where(scored, (log_normalizer - at_target * scale) * LN_2, 0.0))
    if WRITE_GRADIENT:
        weight = tl.where(scored, 1.0, 0.0)
        for begin in range(0, vocab_size, BLOCK):
            index = begin + columns
            value = _load(logits_pointer, index, vocab_size, EVEN)
            if HAS_CAP:
                squashed = _tanh(value * inverse_cap)
                slope = weight - weight * squashed * squashed
                gradient = tl.exp2(squashed * scale - log_normalizer) * slope
                gradient -= tl.where(index == target, slope, 0.0)
            else:
                gradient = tl.exp2(value * scale - log_normalizer) * weight
                gradient -= tl.where(index == target, weight, 0.0)
            gradient = gradient.to(logits_pointer.dtype.element_ty)
            if EVEN:
                tl.store(logits_pointer + index, gradient)
            else:
                tl.store(logits_pointer + index, gradient, mask=index < vocab_size)


def cross_entropy_in_place(
    logits: torch.Tensor, targets: torch.Tensor, cap: float | None, *, write_gradient: bool
) -> torch.Tensor:
    """Nats (N,) in fp32 of the soft-capped `logits` (N, V), which are overwritten with their gradient if asked for.

    Args:
        logits: contiguous, before the cap. targets: (N,) int64; a negative one scores 0 and has no gradient.
    """
    assert logits.is_contiguous()
    rows, vocab_size = logits.shape
    nats = torch.empty(rows, dtype=torch.float32, device=logits.device)
    _cross_entropy[(rows,)](
        logits,
        targets,
        nats,
        vocab_size,
        cap or 1.0,
        HAS_CAP=cap is not None,
        WRITE_GRADIENT=write_gradient,
        EVEN=vocab_size % BLOCK == 0,
        BLOCK=BLOCK,
        num_warps=8,
    )
    return nats

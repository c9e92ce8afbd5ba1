"""How are the loss and its gradient made from logits in one visit of the GPU's memory? (Needs Triton.)"""

import math

import torch
import triton
import triton.language as tl

BLOCK = 4096  # logits a program holds at a time
WARPS = 16
LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))


@triton.jit
def _tanh(x):
    # The hardware's own; its relative error of 2^-11 is a quarter of what rounding the logits to bf16 does.
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _exp2(x):
    # `tl.exp2` also works where the result is too small for a normal number, with more instructions.
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _load(pointer, index, vocab_size, EVEN: tl.constexpr, EVICTION: tl.constexpr):
    if EVEN:
        return tl.load(pointer + index, eviction_policy=EVICTION).to(tl.float32)
    value = tl.load(pointer + index, mask=index < vocab_size, other=-float("inf"), eviction_policy=EVICTION)
    return value.to(tl.float32)


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
    """One row of logits. Powers are taken of 2, as the hardware does: the logits are scaled by log2(e).

    The second pass goes back from the row's end, whose logits are the likeliest to be in the L2 cache still.
    """
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    logits_pointer += row.to(tl.int64) * vocab_size
    target = tl.load(targets_pointer + row)
    scored = target >= 0
    target_pointer = logits_pointer + tl.where(scored, target, 0)
    inverse_cap = 1.0 / cap
    scale = cap * LOG2_E if HAS_CAP else LOG2_E
    at_target = tl.load(target_pointer).to(tl.float32)  # before any gradient takes its place
    slope = 1.0
    if HAS_CAP:
        at_target = _tanh(at_target * inverse_cap)
        slope = 1.0 - at_target * at_target
        powers = tl.zeros((BLOCK,), dtype=tl.float32)
        for begin in range(0, vocab_size, BLOCK):
            value = _load(logits_pointer, begin + columns, vocab_size, EVEN, "evict_last")
            power = _exp2(_tanh(value * inverse_cap) * scale - scale)  # nothing exceeds the cap: it is the maximum
            if not EVEN:
                power = tl.where(begin + columns < vocab_size, power, 0.0)
            powers += power
        log_normalizer = tl.log2(tl.sum(powers)) + scale
    else:
        total, top = 0.0, -float("inf")
        for begin in range(0, vocab_size, BLOCK):
            value = _load(logits_pointer, begin + columns, vocab_size, EVEN, "evict_last")
            higher = tl.maximum(top, tl.max(value) * scale)
            total = total * _exp2(top - higher) + tl.sum(_exp2(value * scale - higher))
            top = higher
        log_normalizer = tl.log2(total) + top
    tl.store(nats_pointer + row, tl.where(scored, (log_normalizer - at_target * scale) * LN_2, 0.0))
    if WRITE_GRADIENT:
        shift = tl.where(scored, log_normalizer, float("inf"))  # where nothing is scored, every power is 0
        dtype = logits_pointer.dtype.element_ty
        blocks = tl.cdiv(vocab_size, BLOCK)
        for step in range(blocks):
            index = (blocks - 1 - step) * BLOCK + columns
            value = _load(logits_pointer, index, vocab_size, EVEN, "evict_first")
            if HAS_CAP:
                squashed = _tanh(value * inverse_cap)
                gradient = _exp2(squashed * scale - shift) * (1.0 - squashed * squashed)
            else:
                gradient = _exp2(value * scale - shift)
            if EVEN:
                tl.store(logits_pointer + index, gradient.to(dtype), eviction_policy="evict_first")
            else:
                tl.store(logits_pointer + index, gradient.to(dtype), mask=index < vocab_size)
        tl.debug_barrier()  # other threads wrote there
        tl.store(target_pointer, ((_exp2(at_target * scale - shift) - 1.0) * slope).to(dtype), mask=scored)


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
        num_warps=WARPS,
    )
    return nats

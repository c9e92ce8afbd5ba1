"""How do a step and a prompt come from few kernels? The same as in `plain`, on a GPU with Triton."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton

from chatmodel.decoding import kernels, plain
from chatmodel.decoding.state import DecodingState
from chatmodel.decoding.weights import DecoderWeights, LayerWeights, Scales
from chatmodel.kernels.attention import attend_flash_2

KEYS_AT_ONCE = 32  # of a program of `attend_kernel`
MOST_PARTS = 32  # that a head's keys are divided into
PROGRAMS = 528  # what keeps an H200's 132 multiprocessors busy with memory: four each
TILE = 8192  # weights a program of `project_one_kernel` holds at a time: 64 a thread
FEW_ROWS = 2  # with more, matrix units pay
TILE_ROWS = 16  # with more, cuBLAS is faster than a product that norms its inputs for every tile again


def find_obstacle(weights: DecoderWeights) -> str | None:
    """Why these kernels cannot compute a model, or None if they can."""
    inner = weights.layers[0].down.shape[1]
    if any(size % 16 for size in (weights.hidden_size, weights.query_size, inner)):
        return "its widths are no multiples of 16"
    if weights.head_dim & (weights.head_dim - 1) or weights.head_dim < 32:
        return f"its heads have {weights.head_dim} channels, which is no power of two from 32 on"
    return None


@dataclass
class Mix:
    """States (B, K), or `scales[0] * states + scales[1] * first` where there are scales."""

    states: torch.Tensor
    first: torch.Tensor | None = None
    scales: Scales | None = None


def project(
    inputs: Mix,
    weight: torch.Tensor,
    *,
    dtype: torch.dtype,
    eps: float | None = None,
    squared: bool = False,
    residual: Mix | None = None,
    cap: float | None = None,
    banned: int | None = None,
) -> torch.Tensor:
    """`weight` (N, K) times the inputs; returns (B, N) in `dtype`.

    Args:
        eps: norm the inputs first, with this.
        squared: ReLU^2 of the product.
        residual: is added; its scales, if any, have to be those of the inputs, or the inputs have none.
        cap, banned: of logits: where they level off, and the one that is minus infinity.
    """
    count, inner = inputs.states.shape
    outer = weight.shape[0]
    out = torch.empty(count, outer, dtype=dtype, device=weight.device)
    scales = inputs.scales if residual is None or residual.scales is None else residual.scales
    unused = inputs.states
    pointers = (
        inputs.states,
        inputs.first if inputs.scales is not None else unused,
        scales.device if scales is not None else unused,
        weight,
        residual.states if residual else unused,
        residual.first if residual and residual.scales is not None else unused,
        out,
    )
    numbers = (-1 if banned is None else banned, eps or 0.0, cap or 1.0)
    switches = {
        "MIX": inputs.scales is not None,
        "NORM": eps is not None,
        "SQUARED": squared,
        "CAP": cap is not None or banned is not None,
        "RESIDUAL": residual is not None,
        "MIXED_RESIDUAL": residual is not None and residual.scales is not None,
    }
    assert not switches["CAP"] or cap is not None
    widest = inner & -inner  # the largest power of two that divides it
    if count <= FEW_ROWS:
        block_k = min(widest, 2048)
        block_n = max(1, min(TILE // block_k, triton.next_power_of_2(outer // PROGRAMS + 1), 16))
        kernels.project_one_kernel[(triton.cdiv(outer, block_n), count)](
            *pointers, *numbers, outer, inner, **switches, BLOCK_N=block_n, BLOCK_K=block_k
        )
        return out
    block_n = 64 if outer >= 64 * PROGRAMS // 4 else 32 if outer >= 32 * PROGRAMS // 4 else 16
    kernels.project_kernel[(triton.cdiv(outer, block_n), triton.cdiv(count, TILE_ROWS))](
        *pointers, *numbers, count, outer, inner, **switches, EXACT=weight.dtype == torch.float32,
        BLOCK_B=TILE_ROWS, BLOCK_N=block_n, BLOCK_K=min(widest, 128),
        num_stages=2 if weight.dtype == torch.float32 else 4,
    )  # fmt: skip
    return out


def attend(
    qkv: torch.Tensor, layer: LayerWeights, weights: DecoderWeights, state: DecodingState, index: int
) -> torch.Tensor:
    """Attention of the newest tokens (B, rows of qkv), whose keys and values are kept; returns (B, query_size)."""
    cache, (count, stride) = state.caches[index], qkv.shape
    capacity, heads, width = cache.keys.shape[2], weights.heads, weights.head_dim
    parts = max(1, min(triton.cdiv(PROGRAMS, count * heads), triton.cdiv(capacity, KEYS_AT_ONCE), MOST_PARTS))
    out = torch.empty(count, weights.query_size, dtype=weights.dtype, device=qkv.device)
    sums = torch.empty(count, heads, parts, width, device=qkv.device) if parts > 1 else out
    totals = torch.empty(count, heads, parts, device=qkv.device) if parts > 1 else out
    kernels.attend_kernel[(count, heads, parts)](
        qkv, state.table, weights.cos, weights.sin, qkv if layer.value_embed is None else layer.value_embed,
        cache.keys, cache.values, sums, totals, out, state.rows, capacity, stride, weights.scaling, weights.eps,
        PARTS=parts, H=heads, G=heads // weights.kv_heads, D=width, HAS_VALUES=layer.value_embed is not None,
        BLOCK=KEYS_AT_ONCE,
    )  # fmt: skip
    if parts > 1:
        block = triton.next_power_of_2(parts)
        kernels.combine_kernel[(count * heads,)](sums, totals, out, PARTS=parts, BLOCK=block, D=width)
    return out


def step(weights: DecoderWeights, state: DecodingState, count: int, banned: int | None) -> torch.Tensor:
    """Logits (count, vocab_size) behind the newest token of each of the first `count` rows.

    Rows that are not active get any logits.
    """
    return (step_narrow if count <= TILE_ROWS else step_wide)(weights, state, count, banned)


def step_narrow(weights: DecoderWeights, state: DecodingState, count: int, banned: int | None) -> torch.Tensor:
    """`step` of few rows: norms and sums are part of the products; the residual stream is kept in fp32."""
    device, eps, dtype = weights.device, weights.eps, weights.dtype
    first = torch.empty(count, weights.hidden_size, device=device)
    embed(weights, state, first)
    states = middle = first
    for index, layer in enumerate(weights.layers):
        mix = Mix(states, first, layer.scales)
        qkv = project(mix, layer.qkv, dtype=torch.float32, eps=eps)
        attended = attend(qkv, layer, weights, state, index)
        states = project(Mix(attended), layer.out, dtype=torch.float32, residual=mix)
        if weights.gated or weights.act_name != "relu2":
            inner = plain.activate(project(Mix(states), layer.up, dtype=dtype, eps=eps), weights)
        else:
            inner = project(Mix(states), layer.up, dtype=dtype, eps=eps, squared=True)
        states = project(Mix(inner.contiguous()), layer.down, dtype=torch.float32, residual=Mix(states))
        if index == weights.middle:
            middle = states
    last = Mix(states, middle, weights.last_scales)
    if weights.cap is None:
        logits = project(last, weights.head, dtype=torch.float32, eps=eps)
        if banned is not None:
            logits[:, banned] = float("-inf")
        return logits
    return project(last, weights.head, dtype=torch.float32, eps=eps, cap=weights.cap, banned=banned)


def step_wide(weights: DecoderWeights, state: DecodingState, count: int, banned: int | None) -> torch.Tensor:
    """`step` of many rows, by cuBLAS and what lies between its products."""
    eps = weights.eps
    first = torch.empty(count, weights.hidden_size, dtype=weights.dtype, device=weights.device)
    embed(weights, state, first)
    states = middle = first
    for index, layer in enumerate(weights.layers):
        mixed, normed = mix_and_norm(states, first, layer.scales, eps)
        attended = attend(F.linear(normed, layer.qkv), layer, weights, state, index)
        states = torch.addmm(mixed, attended, layer.out.T)
        normed = mix_and_norm(states, first, None, eps)[1]
        states = torch.addmm(states, activate(F.linear(normed, layer.up), weights), layer.down.T)
        if index == weights.middle:
            middle = states
    return read_out(states, middle, weights, banned)


def read_out(states: torch.Tensor, middle: torch.Tensor, weights: DecoderWeights, banned: int | None) -> torch.Tensor:
    """`plain.read_out` with one kernel behind the product."""
    normed = mix_and_norm(states, middle, weights.last_scales, weights.eps)[1]
    if weights.dtype == torch.float32:
        raw = F.linear(normed, weights.head)
    else:  # rounded to bf16, neighbouring logits would be equal
        raw = torch.mm(normed, weights.head.T, out_dtype=torch.float32)
    logits = torch.empty(raw.shape, device=raw.device)
    kernels.cap_kernel[(len(raw), triton.cdiv(raw.shape[1], 4096))](
        raw, logits, raw.shape[1], weights.cap or 1.0, -1 if banned is None else banned,
        CAP=weights.cap is not None, BLOCK=4096,
    )  # fmt: skip
    return logits


def embed(weights: DecoderWeights, state: DecodingState, out: torch.Tensor) -> None:
    """The normed embeddings of the newest tokens, into `out` (B, hidden_size)."""
    width = weights.hidden_size
    kernels.embed_kernel[(len(out),)](
        state.table, weights.embedding, out, weights.eps, width, BLOCK=triton.next_power_of_2(width)
    )


def advance(
    state: DecodingState,
    chosen: torch.Tensor,
    end_ids: torch.Tensor,
    call_end: int | None,
    emitted: torch.Tensor,
    uniform: torch.Tensor,
) -> None:
    """`state.advance` for the first rows, into `emitted` (B,), with the numbers of the step after it in `uniform`."""
    kernels.advance_kernel[(1,)](
        state.table, state.forced, chosen, end_ids, emitted, uniform, state.rows, state.forced.shape[1],
        -1 if call_end is None else call_end, len(chosen), NUM_ENDS=len(end_ids),
        BLOCK=triton.next_power_of_2(len(chosen)),
    )  # fmt: skip


def mix_and_norm(
    states: torch.Tensor, first: torch.Tensor, scales: Scales | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`plain.mix_and_norm` of (..., K) states in one kernel."""
    width = states.shape[-1]
    normed = torch.empty_like(states)
    mixed = states if scales is None else torch.empty_like(states)
    kernels.mix_and_norm_kernel[(states.numel() // width,)](
        states, first, states if scales is None else scales.device, mixed, normed, eps, width,
        MIX=scales is not None, BLOCK=triton.next_power_of_2(width),
    )  # fmt: skip
    return mixed, normed


def find_turns(weights: DecoderWeights, positions: torch.Tensor) -> torch.Tensor:
    """What `split_heads` needs to know: the positions themselves."""
    return positions.contiguous()


def split_heads(
    qkv: torch.Tensor, layer: LayerWeights, weights: DecoderWeights, ids: torch.Tensor, turns: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`plain.split_heads`, in the place of `qkv`."""
    kernels.split_heads_kernel[(ids.numel(),)](
        qkv, ids, turns, weights.cos, weights.sin, qkv if layer.value_embed is None else layer.value_embed,
        qkv.shape[-1], weights.eps, H=weights.heads, KV=weights.kv_heads, D=weights.head_dim,
        HAS_VALUES=layer.value_embed is not None, BLOCK_H=triton.next_power_of_2(weights.heads + weights.kv_heads),
        BLOCK_KV=triton.next_power_of_2(weights.kv_heads),
    )  # fmt: skip
    sizes = [weights.query_size, weights.kv_size, weights.kv_size]
    query, key, value = torch.split(qkv[..., : weights.gate_offset], sizes, dim=-1)
    query, key, value = (states.view(*states.shape[:-1], -1, weights.head_dim) for states in (query, key, value))
    return query, key, value


def activate(states: torch.Tensor, weights: DecoderWeights) -> torch.Tensor:
    """`plain.activate`; ReLU^2 in the place of the states."""
    if weights.gated or weights.act_name != "relu2":
        return plain.activate(states, weights)
    kernels.square_relu_kernel[(triton.cdiv(states.numel(), 4096),)](states, states.numel(), BLOCK=4096, num_warps=8)
    return states


def attend_prompt(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, window: int | None
) -> torch.Tensor:
    """`plain.attend_prompt`, with FlashAttention 2's own window where the type allows it."""
    if window is None or window >= query.shape[1] or query.dtype not in (torch.bfloat16, torch.float16):
        return plain.attend_prompt(query, key, value, scaling, window)
    query, key, value = (each.transpose(1, 2) for each in (query, key, value))
    return attend_flash_2(query, key, value, scaling, window).transpose(1, 2)

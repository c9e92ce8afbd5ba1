"""How are prompts read and tokens decoded in plain PyTorch? Runs anywhere, and says what `kernels` has to compute."""

import torch
import torch.nn.functional as F

from chatmodel.decoding.state import LayerCache
from chatmodel.decoding.weights import DecoderWeights, LayerWeights, Scales
from chatmodel.kernels.attention import attend_blocks, attend_dense

Turns = tuple[torch.Tensor, torch.Tensor]


def norm(states: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square norm of the last dimension."""
    return F.rms_norm(states, (states.shape[-1],), eps=eps)


def mix_and_norm(
    states: torch.Tensor, first: torch.Tensor, scales: Scales | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of the shares of two states, or the first of them if there are no scales, and the norm of that."""
    if scales is None:
        return states, norm(states, eps)
    mixed = torch.add(states * scales.host[0], first, alpha=scales.host[1])
    return mixed, norm(mixed, eps)


def find_turns(weights: DecoderWeights, positions: torch.Tensor) -> Turns:
    """What `split_heads` needs to know of positions (...): cosines and sines (..., 1, head_dim)."""
    return weights.wide_cos[positions].unsqueeze(-2), weights.wide_sin[positions].unsqueeze(-2)


def split_heads(
    qkv: torch.Tensor, layer: LayerWeights, weights: DecoderWeights, ids: torch.Tensor, turns: Turns
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values (..., heads, head_dim) from the joined projections (..., rows) of ids.

    Queries and keys are normed and turned, values have their value embeddings.
    """
    width, shape = weights.head_dim, (*qkv.shape[:-1], -1, weights.head_dim)
    split = weights.query_size + weights.kv_size
    normed = norm(qkv[..., :split].view(shape), weights.eps)
    turned = torch.addcmul(normed * turns[0], torch.roll(normed, width // 2, dims=-1), turns[1])
    value = qkv[..., split : weights.gate_offset].view(shape)
    if layer.value_embed is not None:
        gate = 3 * torch.sigmoid(qkv[..., weights.gate_offset : weights.gate_offset + weights.kv_heads])
        value = torch.addcmul(value, gate.unsqueeze(-1), F.embedding(ids, layer.value_embed).view(value.shape))
    return turned[..., : weights.heads, :], turned[..., weights.heads :, :], value


def activate(states: torch.Tensor, weights: DecoderWeights) -> torch.Tensor:
    """The MLP's activation, of a gated one with the product."""
    if not weights.gated:
        return F.relu(states).square() if weights.act_name == "relu2" else weights.act(states)
    gate, up = states.chunk(2, dim=-1)
    return weights.act(gate) * up


def attend_prompt(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, window: int | None
) -> torch.Tensor:
    """Causal attention of (B, T, heads, head_dim) states; returns the same shape."""
    groups = query.shape[2] // key.shape[2]
    states = [query] + [s.repeat_interleave(groups, dim=2) if groups > 1 else s for s in (key, value)]
    query, key, value = (each.transpose(1, 2) for each in states)
    attend = attend_dense if window is None or window >= query.shape[2] else attend_blocks
    return attend(query, key, value, scaling, window).transpose(1, 2)


def attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, scaling: float, mask: torch.Tensor | None
) -> torch.Tensor:
    """Attention of one query a row; returns (B, heads * head_dim).

    On a CPU this order of the products is up to twice as fast as `scaled_dot_product_attention` in fp32, four times in
    bf16.

    Args:
        query: (B, heads, head_dim).
        keys, values: (B, kv_heads, T, head_dim).
        mask: (B, 1, T, 1), False where nothing is seen.
    """
    grouped = query.view(len(query), keys.shape[1], -1, query.shape[-1])
    # Scores rounded to bf16 would be off by some hundredths.
    scores = (keys.float() @ grouped.mT.float()) * scaling
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return (scores.softmax(dim=2).to(values.dtype).mT @ values).view(len(query), -1)


def read_out(states: torch.Tensor, middle: torch.Tensor, weights: DecoderWeights, banned: int | None) -> torch.Tensor:
    """Logits (B, vocab_size) in fp32 of the last layer's states (B, hidden_size); `banned` can never be chosen."""
    normed = mix_and_norm(states, middle, weights.last_scales, weights.eps)[1]
    logits = F.linear(normed, weights.head).float()
    if weights.cap is not None:
        logits = torch.tanh(logits / weights.cap) * weights.cap
    if banned is not None:
        logits[:, banned] = float("-inf")
    return logits


def step(
    weights: DecoderWeights,
    caches: list[LayerCache],
    tokens: torch.Tensor,
    positions: torch.Tensor,
    *,
    longest: int,
    even: bool,
    banned: int | None,
) -> torch.Tensor:
    """Logits (B, vocab_size) behind one more token of each of the first B rows; its keys and values are kept.

    Args:
        tokens, positions: (B,).
        longest: the greatest of the positions, which the host knows.
        even: whether all positions are equal, so that nothing needs a mask.
    """
    count, turns = len(tokens), find_turns(weights, positions)
    rows = torch.arange(count, device=tokens.device)
    states = first = norm(F.embedding(tokens, weights.embedding), weights.eps)
    middle = states
    for index, (layer, cache) in enumerate(zip(weights.layers, caches, strict=True)):
        mixed, normed = mix_and_norm(states, first, layer.scales, weights.eps)
        query, key, value = split_heads(F.linear(normed, layer.qkv), layer, weights, tokens, turns)
        capacity = cache.keys.shape[2]
        seen = min(longest + 1, capacity)
        mask = None
        if even:
            cache.keys[:count, :, longest % capacity] = key
            cache.values[:count, :, longest % capacity] = value
        else:  # in a full ring all keys are seen, wherever it begins
            place = positions % capacity
            cache.keys[rows, :, place], cache.values[rows, :, place] = key, value
            mask = (torch.arange(seen, device=tokens.device) <= positions[:, None])[:, None, :, None]
        attended = attend(
            query, cache.keys[:count, :, :seen], cache.values[:count, :, :seen], scaling=weights.scaling, mask=mask
        )
        states = mixed + F.linear(attended, layer.out)
        states = states + F.linear(activate(F.linear(norm(states, weights.eps), layer.up), weights), layer.down)
        if index == weights.middle:
            middle = states
    return read_out(states, middle, weights, banned)

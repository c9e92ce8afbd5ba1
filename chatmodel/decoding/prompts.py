"""How is a batch of prompts read? Once, all tokens at a time, keeping keys and values."""

from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F

from chatmodel.decoding.plain import attend, norm
from chatmodel.decoding.weights import DecoderWeights

# index of the layer, keys and values (B, T, kv_heads, head_dim)
Keep = Callable[[int, torch.Tensor, torch.Tensor], None]


def read_prompts(
    weights: DecoderWeights,
    ids: torch.Tensor,
    lengths: torch.Tensor,
    *,
    keep: Keep,
    operations: ModuleType,
    banned: int | None,
) -> torch.Tensor:
    """Logits (B, vocab_size) behind each prompt.

    Args:
        ids: (B, T), padded on the right with any token: no token sees what follows it.
        lengths: (B,) without the padding.
        keep: takes each layer's keys and values.
        operations: the module `plain`, or `fused` on a GPU.
    """
    turns = operations.find_turns(weights, torch.arange(ids.shape[1], device=ids.device).expand(ids.shape))
    states = first = norm(F.embedding(ids, weights.embedding), weights.eps)
    last = (torch.arange(len(ids), device=ids.device), lengths - 1)
    middle = states[last]
    for index, layer in enumerate(weights.layers):
        mixed, normed = operations.mix_and_norm(states, first, layer.scales, weights.eps)
        qkv = F.linear(normed, layer.qkv)
        query, key, value = operations.split_heads(qkv, layer, weights, ids, turns)
        keep(index, key, value)
        is_last = layer is weights.layers[-1]
        if is_last:  # only the last token's output is asked for
            mixed = mixed[last]
            attended = attend_last(query[last], key, value, lengths, weights.scaling, layer.window)
        else:
            attended = operations.attend_prompt(query, key, value, weights.scaling, layer.window).flatten(-2)
        states = add_product(mixed, attended, layer.out)
        normed = operations.mix_and_norm(states, first, None, weights.eps)[1]
        states = add_product(states, operations.activate(F.linear(normed, layer.up), weights), layer.down)
        if index == weights.middle:
            middle = states if is_last else states[last]
    return operations.read_out(states, middle, weights, banned)


def attend_last(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor,
    scaling: float,
    window: int | None,
) -> torch.Tensor:
    """Attention of the last tokens: query (B, heads, head_dim), keys and values (B, T, kv_heads, head_dim)."""
    positions = torch.arange(keys.shape[1], device=keys.device)
    mask = positions < lengths[:, None]
    if window is not None:
        mask = mask & (positions >= lengths[:, None] - window)
    return attend(query, keys.transpose(1, 2), values.transpose(1, 2), scaling=scaling, mask=mask[:, None, :, None])


def add_product(residual: torch.Tensor, states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """residual (..., N) + states (..., K) times weight (N, K), added within the product."""
    return torch.addmm(residual.flatten(0, -2), states.flatten(0, -2), weight.T).view(residual.shape)

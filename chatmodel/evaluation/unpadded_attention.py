"""How do models of ours attend on a CPU where no row needs a mask? Windows in blocks: linear in the length."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from chatmodel.evaluation.scoring import get_device
from chatmodel.model.modeling_gpt import GPTPreTrainedModel

UNPADDED_ATTENTION = "chatmodel_unpadded"  # the name Transformers knows it by


@contextmanager
def attending_unpadded(model: nn.Module) -> Iterator[None]:
    """Scoring's attention for a model of ours on a CPU; any other keeps its own."""
    usual = "sdpa"
    if not isinstance(model, GPTPreTrainedModel) or get_device(model).type != "cpu":
        yield
        return
    if model.config._attn_implementation != usual:
        yield
        return
    ALL_ATTENTION_FUNCTIONS.register(UNPADDED_ATTENTION, attend_unpadded)
    model.set_attn_implementation(UNPADDED_ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(usual)


def attend_unpadded(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention without padding; the last key is the last query's own.

    Args: query (B, heads, T, head_dim), key and value with as many positions or more, those of a cache first.
    Returns (B, T, heads, head_dim) and no weights.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    length, seen = query.shape[2], key.shape[2]
    if length == seen and sliding_window is not None and 2 * sliding_window <= length:
        return attend_windows(query, key, value, scaling, sliding_window).transpose(1, 2), None
    mask = None
    if length < seen or (sliding_window is not None and sliding_window < length):
        distance = torch.arange(seen - length, seen)[:, None] - torch.arange(seen)
        mask = distance >= 0 if sliding_window is None else (distance >= 0) & (distance < sliding_window)
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling)
    return output.transpose(1, 2), None


def attend_windows(query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int) -> Tensor:
    """Attention to the last `window` positions: blocks of so many queries, each on its own and the previous block.

    Args: all (B, heads, T, head_dim), as the result.
    """
    batch, heads, length, width = query.shape
    padding = -length % window
    shape = (batch, heads, -1, window, width)
    query, key, value = (F.pad(states, (0, 0, 0, padding)).reshape(shape) for states in (query, key, value))
    keys, values = (
        torch.cat((F.pad(states, (0, 0, 0, 0, 1, 0))[:, :, :-1], states), dim=3) for states in (key, value)
    )
    weights = (query * scaling) @ keys.mT  # (B, heads, blocks, window, 2 * window)
    distance = torch.arange(window, 2 * window)[:, None] - torch.arange(2 * window)
    weights.masked_fill_((distance < 0) | (distance >= window), -torch.inf)
    weights[:, :, 0, :, :window] = -torch.inf  # nothing comes before the first block
    output = weights.softmax(dim=-1) @ values
    return output.reshape(batch, heads, -1, width)[:, :, :length]

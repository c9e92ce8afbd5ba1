"""How does a CPU attend fastest while it trains? By matrix products, a block of queries at a time.

PyTorch's own kernel for CPUs takes 1.5 to 2 times as long over whole rows in bf16, and 2 to 5 times with a window: it
computes what its mask then hides (docs/experiments.md).
"""

from collections.abc import Iterator
from typing import Any

import torch

QUERIES = 128  # a block's; the keys of later blocks are never multiplied


def attend_products(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, window: int | None
) -> torch.Tensor:
    """Causal attention by `ProductAttention`."""
    return ProductAttention.apply(query, key, value, scaling, window, None)  # type: ignore[no-untyped-call]


def attend_documents_products(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    window: int | None,
    document_starts: torch.Tensor,
) -> torch.Tensor:
    """`attend_products` within documents."""
    batch, _, length, _ = query.shape
    positions = torch.arange(batch * length)
    begins = document_starts[torch.bucketize(positions, document_starts, right=True) - 1]
    begins = (begins - positions // length * length).clamp(min=0).view(batch, length)
    return ProductAttention.apply(query, key, value, scaling, window, begins)  # type: ignore[no-untyped-call]


class ProductAttention(torch.autograd.Function):
    """Causal attention that keeps its probabilities for the backward pass.

    Scores and their softmax are in fp32, all other products in the states' dtype, as in flash attention.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        window: int | None,
        begins: torch.Tensor | None,
    ) -> torch.Tensor:
        """Args: states (B, heads, T, head_dim); `begins` (B, T), the first position each may see, by default 0."""
        batch, heads, length, width = query.shape
        query, key, value = (states.reshape(batch * heads, length, width) for states in (query, key, value))
        exact = torch.promote_types(query.dtype, torch.float32)
        exact_query, exact_key = query.to(exact) * scaling, key.to(exact)
        output = torch.empty_like(query)
        blocks, kept = [], []
        for queries, keys in _blocks(length, window):
            if begins is not None:
                keys = slice(max(keys.start, int(begins[:, queries.start].min())), keys.stop)
            scores = torch.bmm(exact_query[:, queries], exact_key[:, keys].mT)
            hidden = _hidden(queries, keys, window, begins)
            scores.view(batch, heads, *scores.shape[1:]).masked_fill_(hidden, -torch.inf)
            shares = scores.softmax(dim=-1).to(query.dtype)
            output[:, queries] = torch.bmm(shares, value[:, keys])
            blocks.append((queries, keys))
            kept.append(shares)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.blocks, ctx.scaling, ctx.heads = blocks, scaling, heads
        return output.view(batch, heads, length, width)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients for query, key and value."""
        query, key, value, *kept = ctx.saved_tensors
        gradient = gradient.reshape(query.shape)
        for_query = torch.empty_like(query)
        # A key's gradient is a sum over blocks.
        for_key, for_value = torch.zeros(2, *key.shape, dtype=torch.promote_types(key.dtype, torch.float32))
        for (queries, keys), shares in zip(ctx.blocks, kept, strict=True):
            for_value[:, keys] += torch.bmm(shares.mT, gradient[:, queries])
            for_shares = torch.bmm(gradient[:, queries], value[:, keys].mT)
            for_scores = torch.ops.aten._softmax_backward_data(for_shares, shares, -1, shares.dtype).mul_(ctx.scaling)
            for_query[:, queries] = torch.bmm(for_scores, key[:, keys])
            for_key[:, keys] += torch.bmm(for_scores.mT, query[:, queries])
        found = (for_query, for_key.to(key.dtype), for_value.to(value.dtype))
        return *(states.unflatten(0, (-1, ctx.heads)) for states in found), None, None, None


def count_kept_shares(length: int, window: int | None) -> int:
    """How many probabilities are kept for each row and head."""
    return sum((queries.stop - queries.start) * (keys.stop - keys.start) for queries, keys in _blocks(length, window))


def _blocks(length: int, window: int | None) -> Iterator[tuple[slice, slice]]:
    """Queries, and the keys that some of them see."""
    for start in range(0, length, QUERIES):
        stop = min(start + QUERIES, length)
        yield slice(start, stop), slice(0 if window is None else max(0, start - window + 1), stop)


def _hidden(queries: slice, keys: slice, window: int | None, begins: torch.Tensor | None) -> torch.Tensor:
    """Which keys of a block each query may not see: (queries, keys), or (B, 1, queries, keys) with `begins`."""
    position = torch.arange(keys.start, keys.stop)
    distance = torch.arange(queries.start, queries.stop)[:, None] - position
    hidden = distance < 0
    if window is not None:
        hidden |= distance >= window
    return hidden if begins is None else hidden | (position < begins[:, None, queries, None])

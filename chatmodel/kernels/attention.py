"""The ways to attend while training: PyTorch's own, in plain blocks, cuDNN's, FlashAttention's, FlexAttention."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from chatmodel.kernels.flash_attention import flash_attention

# query, key, value, all (B, heads, T, head_dim), causal; scaling; window, the keys a query sees, or None for all.
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float, int | None], torch.Tensor]
States = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
# The same, and where documents start (`chatmodel.data.rows`): no query sees keys of a document before its own.
DocumentAttention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float, int | None, torch.Tensor], torch.Tensor]


def attend_dense(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, window: int | None
) -> torch.Tensor:
    """Causal attention by `scaled_dot_product_attention`, with a dense mask if there is a window; runs anywhere."""
    length = query.shape[2]
    if window is None or window >= length:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    positions = torch.arange(length, device=query.device)
    distance = positions[:, None] - positions
    mask = (distance >= 0) & (distance < window)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)


def attend_blocks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, window: int | None
) -> torch.Tensor:
    """Windowed attention in plain PyTorch: blocks of `window` queries, each on its own and the previous block's keys.

    Work and memory grow with T x window instead of T x T.
    """
    batch, heads, length, width = query.shape
    if window is None or 2 * window > length:
        return attend_dense(query, key, value, scaling, window)
    padding = -length % window
    blocks = [
        F.pad(states, (0, 0, 0, padding)).reshape(batch, heads, -1, window, width).transpose(1, 2)
        for states in (query, key, value)
    ]
    num_blocks = blocks[0].shape[1]
    query, key, value = (states.reshape(batch * num_blocks, heads, window, width) for states in blocks)
    before = [F.pad(states, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1].reshape(key.shape) for states in blocks[1:]]
    key, value = torch.cat((before[0], key), dim=2), torch.cat((before[1], value), dim=2)
    positions = torch.arange(2 * window, device=query.device)
    distance = positions[window:, None] - positions
    seen = (distance >= 0) & (distance < window)
    is_first = torch.arange(batch * num_blocks, device=query.device) % num_blocks == 0
    mask = seen & ~(is_first[:, None, None] & (positions < window))  # nothing comes before the first block
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None], scale=scaling)
    output = output.view(batch, num_blocks, heads, window, width).transpose(1, 2)
    return output.reshape(batch, heads, -1, width)[:, :, :length]


def attend_cudnn(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, window: int | None
) -> torch.Tensor:
    """Full causal attention by cuDNN's kernel."""
    if window is not None and window < query.shape[2]:
        raise NotImplementedError("PyTorch's cuDNN attention knows no window")
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)


def attend_flash_2(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, window: int | None
) -> torch.Tensor:
    """Causal attention by the FlashAttention 2 that PyTorch carries."""
    states = (query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    return _run_flash_2(states, None, query.shape[2], scaling, window).transpose(1, 2)


def attend_flash_3(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, window: int | None
) -> torch.Tensor:
    """Causal attention by FlashAttention 3, package flash_attn_3 (Hopper)."""
    return _run_flash_package(3, (query, key, value), scaling, window)


def attend_flash_4(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, window: int | None
) -> torch.Tensor:
    """Causal attention by FlashAttention 4, package flash-attn-4 (Hopper, Blackwell)."""
    return _run_flash_package(4, (query, key, value), scaling, window)


def _run_flash_package(version: int, states: States, scaling: float, window: int | None) -> torch.Tensor:
    query, key, value = (part.transpose(1, 2) for part in states)
    output, _ = flash_attention(query, key, value, None, query.shape[1], scaling, window, version)
    return output.transpose(1, 2)


def attend_flex(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, window: int | None
) -> torch.Tensor:
    """Causal attention by FlexAttention, after `prepare_block_mask`; it must run under `torch.compile`."""
    mask = _BLOCK_MASKS[query.shape[2], window]
    output = flex_attention(query, key, value, block_mask=mask, scale=scaling)
    assert isinstance(output, torch.Tensor)
    return output


_BLOCK_MASKS: dict[tuple[int, int | None], BlockMask] = {}  # made once, outside of compiled code


def prepare_block_mask(length: int, window: int | None, device: torch.device) -> None:
    """Make the block mask that `attend_flex` reads."""

    def sees(batch: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        causal = query >= key
        return causal if window is None else causal & (query - key < window)

    _BLOCK_MASKS[length, window] = create_block_mask(sees, None, None, length, length, device=device)


def attend_documents_dense(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    window: int | None,
    document_starts: torch.Tensor,
) -> torch.Tensor:
    """`attend_dense` within documents, by a dense mask; runs anywhere."""
    batch, _, length, _ = query.shape
    positions = torch.arange(batch * length, device=query.device)
    documents = torch.bucketize(positions, document_starts, right=True).view(batch, length)
    distance = positions[:length, None] - positions[:length]
    seen = (distance >= 0) & (distance < (window or length))
    mask = (seen & (documents[:, :, None] == documents[:, None]))[:, None]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)


def attend_documents_flash_2(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    window: int | None,
    document_starts: torch.Tensor,
) -> torch.Tensor:
    """`attend_flash_2` within documents."""
    batch, _, length, _ = query.shape
    states = (_join_rows(query), _join_rows(key), _join_rows(value))
    return _part_rows(_run_flash_2(states, document_starts, length, scaling, window), batch)


def _run_flash_2(
    states: States,
    document_starts: torch.Tensor | None,
    longest: int,
    scaling: float,
    window: int | None,
) -> torch.Tensor:
    """PyTorch's kernel on query, key, value: rows (B, T, heads, head_dim), or documents (tokens, heads, head_dim)."""
    output: torch.Tensor = torch.ops.aten._flash_attention_forward(
        *states,
        document_starts,
        document_starts,
        longest,
        longest,
        0.0,
        True,
        False,
        scale=scaling,
        window_size_left=None if window is None else window - 1,
        window_size_right=None if window is None else 0,
    )[0]
    return output


def attend_documents_flash_3(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    window: int | None,
    document_starts: torch.Tensor,
) -> torch.Tensor:
    """`attend_flash_3` within documents."""
    return _run_flash_package_within(3, (query, key, value), scaling, window, document_starts)


def attend_documents_flash_4(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    window: int | None,
    document_starts: torch.Tensor,
) -> torch.Tensor:
    """`attend_flash_4` within documents."""
    return _run_flash_package_within(4, (query, key, value), scaling, window, document_starts)


def _run_flash_package_within(
    version: int, states: States, scaling: float, window: int | None, document_starts: torch.Tensor
) -> torch.Tensor:
    batch, _, length, _ = states[0].shape
    query, key, value = (_join_rows(part) for part in states)
    output, _ = flash_attention(query, key, value, document_starts, length, scaling, window, version)
    return _part_rows(output, batch)


def _join_rows(states: torch.Tensor) -> torch.Tensor:
    """(B, heads, T, head_dim) to (B * T, heads, head_dim), as the kernels for documents want it."""
    return states.transpose(1, 2).flatten(0, 1)


def _part_rows(states: torch.Tensor, batch: int) -> torch.Tensor:
    return states.unflatten(0, (batch, -1)).transpose(1, 2)  # type: ignore[no-untyped-call]

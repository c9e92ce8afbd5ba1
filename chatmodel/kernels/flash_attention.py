"""How does PyTorch call FlashAttention 3 and 4, so that compiled code holds each call as one operation?

The states are rows (B, T, heads, head_dim), or with `document_starts` (int32, ending with the number of tokens) the
tokens of all documents one after the other (tokens, heads, head_dim); no document is longer than `longest`.
"""

from typing import Any

import torch

States = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # of query, key, value


@torch.library.custom_op("chatmodel::flash_attention", mutates_args=(), device_types="cuda")
def flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    document_starts: torch.Tensor | None,
    longest: int,
    scaling: float,
    window: int | None,
    version: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention; returns the query's shape and the log-sum-exp (B, heads, T) or (heads, tokens).

    Args:
        version: 3 is the package flash_attn_3, 4 is flash-attn-4.
    """
    forward = {3: _run_forward_3, 4: _run_forward_4}[version]
    return forward((query, key, value), _arguments(document_starts, longest, scaling, window))


@torch.library.custom_op("chatmodel::flash_attention_backward", mutates_args=(), device_types="cuda")
def flash_attention_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    log_sum_exp: torch.Tensor,
    document_starts: torch.Tensor | None,
    longest: int,
    scaling: float,
    window: int | None,
    version: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients for query, key and value."""
    backward = {3: _run_backward_3, 4: _run_backward_4}[version]
    arguments = _arguments(document_starts, longest, scaling, window)
    return backward(gradient.contiguous(), (query, key, value), output, log_sum_exp, arguments)


@flash_attention.register_fake
def _(query, key, value, document_starts, longest, scaling, window, version):  # type: ignore[no-untyped-def]
    *rows, heads, _ = query.shape
    sizes = (heads, *rows) if document_starts is not None else (rows[0], heads, rows[1])
    return query.new_empty(query.shape), query.new_empty(sizes, dtype=torch.float32)


@flash_attention_backward.register_fake
def _(gradient, query, key, value, *_):  # type: ignore[no-untyped-def]
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _keep_for_backward(ctx, inputs, output):  # type: ignore[no-untyped-def]
    query, key, value, document_starts, ctx.longest, ctx.scaling, ctx.window, ctx.version = inputs
    ctx.save_for_backward(query, key, value, *output, document_starts)


def _differentiate(ctx, gradient, _):  # type: ignore[no-untyped-def]
    gradients = flash_attention_backward(
        gradient, *ctx.saved_tensors, ctx.longest, ctx.scaling, ctx.window, ctx.version
    )
    return *gradients, None, None, None, None, None


flash_attention.register_autograd(_differentiate, setup_context=_keep_for_backward)


def _arguments(
    document_starts: torch.Tensor | None, longest: int, scaling: float, window: int | None
) -> dict[str, Any]:
    """What forward and backward of both packages call alike; they take a window for another kind than causal."""
    arguments: dict[str, Any] = {"softmax_scale": scaling, "causal": window is None}
    if window is not None:
        arguments |= {"window_size_left": window - 1, "window_size_right": 0}
    if document_starts is not None:
        arguments |= {"cu_seqlens_q": document_starts, "cu_seqlens_k": document_starts}
        arguments |= {"max_seqlen_q": longest, "max_seqlen_k": longest}
    return arguments


def _run_forward_3(states: States, arguments: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Source: hopper/flash_attn_interface.py of Dao-AILab/flash-attention@0251105."""
    from flash_attn_interface import _flash_attn_forward

    output, log_sum_exp, *_ = _flash_attn_forward(*states, **arguments)
    return output, log_sum_exp


def _run_backward_3(
    gradient: torch.Tensor,
    states: States,
    output: torch.Tensor,
    log_sum_exp: torch.Tensor,
    arguments: dict[str, Any],
) -> States:
    from flash_attn_interface import _flash_attn_backward

    query, key, value = (torch.empty_like(part, memory_format=torch.contiguous_format) for part in states)
    arguments = {"is_causal" if name == "causal" else name: value for name, value in arguments.items()}
    _flash_attn_backward(gradient, *states, output, log_sum_exp, dq=query, dk=key, dv=value, **arguments)
    return query, key, value


def _run_forward_4(states: States, arguments: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Source: the interface of flash-attn-4 4.0.0b36; later results of its functions are not looked at."""
    from flash_attn.cute.interface import _flash_attn_fwd

    results = _flash_attn_fwd(*states, return_lse=True, **arguments)
    return results[0], results[1]


def _run_backward_4(
    gradient: torch.Tensor,
    states: States,
    output: torch.Tensor,
    log_sum_exp: torch.Tensor,
    arguments: dict[str, Any],
) -> States:
    from flash_attn.cute.interface import _flash_attn_bwd

    results = _flash_attn_bwd(*states, output, gradient, log_sum_exp, **arguments)
    return results[0], results[1], results[2]

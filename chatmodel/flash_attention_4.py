"""How does PyTorch call FlashAttention 4 (package flash-attn-4), so that compiled code holds it as one operation?"""

import torch
from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd


def _window(window: int | None) -> dict[str, object]:
    if window is None:
        return {"causal": True}
    return {"causal": False, "window_size_left": window - 1, "window_size_right": 0}


@torch.library.custom_op("chatmodel::flash_attention_4", mutates_args=(), device_types="cuda")
def flash_attention_4(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, window: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of (B, T, heads, head_dim); returns the same shape and the log-sum-exp (B, heads, T).

    Source: the interface of flash-attn-4 4.0.0b36; later results of its functions are not looked at.
    """
    results = _flash_attn_fwd(query, key, value, softmax_scale=scaling, return_lse=True, **_window(window))
    return results[0], results[1]


@flash_attention_4.register_fake
def _(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, window: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, length, heads, _ = query.shape
    return query.new_empty(query.shape), query.new_empty((batch, heads, length), dtype=torch.float32)


@torch.library.custom_op("chatmodel::flash_attention_4_backward", mutates_args=(), device_types="cuda")
def flash_attention_4_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    log_sum_exp: torch.Tensor,
    scaling: float,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients for query, key and value."""
    results = _flash_attn_bwd(
        query, key, value, output, gradient.contiguous(), log_sum_exp, softmax_scale=scaling, **_window(window)
    )
    return results[0], results[1], results[2]


@flash_attention_4_backward.register_fake
def _(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    log_sum_exp: torch.Tensor,
    scaling: float,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _keep_for_backward(ctx, inputs, output):  # type: ignore[no-untyped-def]
    query, key, value, ctx.scaling, ctx.window = inputs
    ctx.save_for_backward(query, key, value, *output)


def _differentiate(ctx, gradient, _):  # type: ignore[no-untyped-def]
    gradients = flash_attention_4_backward(gradient, *ctx.saved_tensors, ctx.scaling, ctx.window)
    return *gradients, None, None


flash_attention_4.register_autograd(_differentiate, setup_context=_keep_for_backward)


@torch.library.custom_op("chatmodel::flash_attention_4_documents", mutates_args=(), device_types="cuda")
def flash_attention_4_documents(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    document_starts: torch.Tensor,
    longest: int,
    scaling: float,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same within documents: states (tokens, heads, head_dim), int32 starts that end with the number of tokens.

    Returns the states' shape and the log-sum-exp (heads, tokens). No document is longer than `longest`.
    """
    places = {"cu_seqlens_q": document_starts, "cu_seqlens_k": document_starts}
    lengths = {"max_seqlen_q": longest, "max_seqlen_k": longest}
    results = _flash_attn_fwd(
        query, key, value, softmax_scale=scaling, return_lse=True, **places, **lengths, **_window(window)
    )
    return results[0], results[1]


@flash_attention_4_documents.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    document_starts: torch.Tensor,
    longest: int,
    scaling: float,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, heads, _ = query.shape
    return query.new_empty(query.shape), query.new_empty((heads, tokens), dtype=torch.float32)


@torch.library.custom_op("chatmodel::flash_attention_4_documents_backward", mutates_args=(), device_types="cuda")
def flash_attention_4_documents_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    log_sum_exp: torch.Tensor,
    document_starts: torch.Tensor,
    longest: int,
    scaling: float,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients for query, key and value."""
    places = {"cu_seqlens_q": document_starts, "cu_seqlens_k": document_starts}
    lengths = {"max_seqlen_q": longest, "max_seqlen_k": longest}
    states = (query, key, value, output, gradient.contiguous(), log_sum_exp)
    results = _flash_attn_bwd(*states, softmax_scale=scaling, **places, **lengths, **_window(window))
    return results[0], results[1], results[2]


@flash_attention_4_documents_backward.register_fake
def _(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    log_sum_exp: torch.Tensor,
    document_starts: torch.Tensor,
    longest: int,
    scaling: float,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _keep_documents_for_backward(ctx, inputs, output):  # type: ignore[no-untyped-def]
    query, key, value, document_starts, ctx.longest, ctx.scaling, ctx.window = inputs
    ctx.save_for_backward(query, key, value, *output, document_starts)


def _differentiate_documents(ctx, gradient, _):  # type: ignore[no-untyped-def]
    gradients = flash_attention_4_documents_backward(
        gradient, *ctx.saved_tensors, ctx.longest, ctx.scaling, ctx.window
    )
    return *gradients, None, None, None, None


flash_attention_4_documents.register_autograd(_differentiate_documents, setup_context=_keep_documents_for_backward)

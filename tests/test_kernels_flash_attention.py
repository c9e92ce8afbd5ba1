"""FlashAttention 3 and 4 are asked for what plain kernels compute; dense attention plays their packages here."""

import sys
from types import ModuleType

import pytest
import torch

from chatmodel.kernels import flash_attention
from chatmodel.kernels.attention import attend_dense, attend_documents_dense

BATCH, HEADS, LENGTH, WIDTH, SCALING = 2, 3, 24, 8, 0.3
STARTS = torch.tensor([0, 5, 24, 30, 48, 48, 48], dtype=torch.int32)  # the last two documents are empty


def attend(query, key, value, scale, *, causal, left, right, starts):
    """What both packages promise; `left` and `right` are the keys seen beside the query's own, -1 for all."""
    rows = query if starts is None else query[None]
    length = rows.shape[1]
    distance = torch.arange(length)[:, None] - torch.arange(length)
    seen = torch.ones(length, length, dtype=torch.bool)
    if causal or right == 0:
        seen &= distance >= 0
    if left >= 0:
        seen &= distance <= left
    if starts is not None:
        documents = torch.bucketize(torch.arange(length), starts, right=True)
        seen &= documents[:, None] == documents
    states = (part.reshape(rows.shape).transpose(1, 2) for part in (query, key, value))
    output = torch.nn.functional.scaled_dot_product_attention(*states, attn_mask=seen, scale=scale)
    return output.transpose(1, 2).reshape(query.shape)


def differentiate(gradient, states, scale, **options):
    leaves = [part.detach().requires_grad_() for part in states]
    return torch.autograd.grad(attend(*leaves, scale, **options), leaves, gradient)


def read(causal, window_size_left=-1, window_size_right=-1, **lengths):
    """The options that both packages share, and lengths that come together or not at all."""
    starts = lengths.get("cu_seqlens_q")
    if starts is not None:
        assert set(lengths) == {"cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"}
        assert lengths["cu_seqlens_k"] is starts
        assert lengths["max_seqlen_q"] == lengths["max_seqlen_k"] == LENGTH
    assert not (causal and window_size_left >= 0), "a window comes in the place of causal"
    return {"causal": causal, "left": window_size_left, "right": window_size_right, "starts": starts}


def play_flash_attn_3(monkeypatch):
    """Signatures: hopper/flash_attn_interface.py of Dao-AILab/flash-attention@0251105."""
    package = ModuleType("flash_attn_interface")

    def forward(q, k, v, *, softmax_scale, causal, **options):
        nothing = torch.empty(0)
        return attend(q, k, v, softmax_scale, **read(causal, **options)), nothing, nothing, nothing

    def backward(dout, q, k, v, out, softmax_lse, *, dq, dk, dv, softmax_scale, is_causal, **options):
        gradients = differentiate(dout, (q, k, v), softmax_scale, **read(is_causal, **options))
        for place, gradient in zip((dq, dk, dv), gradients, strict=True):
            place.copy_(gradient)
        return torch.empty(0)

    package._flash_attn_forward, package._flash_attn_backward = forward, backward
    monkeypatch.setitem(sys.modules, "flash_attn_interface", package)


def play_flash_attn_4(monkeypatch):
    """Signatures: flash_attn/cute/interface.py of flash-attn-4 4.0.0b36."""
    package = ModuleType("flash_attn.cute.interface")

    def forward(q, k, v, *, softmax_scale, causal, return_lse, **options):
        assert return_lse
        return attend(q, k, v, softmax_scale, **read(causal, **options)), torch.empty(0)

    def backward(q, k, v, out, dout, lse, *, softmax_scale, causal, **options):
        return differentiate(dout, (q, k, v), softmax_scale, **read(causal, **options))

    package._flash_attn_fwd, package._flash_attn_bwd = forward, backward
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", package)


@pytest.mark.parametrize("version", [3, 4])
@pytest.mark.parametrize("window", [None, 1, 6])
@pytest.mark.parametrize("apart", [False, True])
def test_both_packages_are_asked_for_causal_attention(monkeypatch, version, window, apart):
    {3: play_flash_attn_3, 4: play_flash_attn_4}[version](monkeypatch)
    forward = {3: flash_attention._run_forward_3, 4: flash_attention._run_forward_4}[version]
    backward = {3: flash_attention._run_backward_3, 4: flash_attention._run_backward_4}[version]
    generator = torch.Generator().manual_seed(0)
    query, key, value, gradient = (torch.randn(BATCH, HEADS, LENGTH, WIDTH, generator=generator) for _ in range(4))
    leaves = [part.clone().requires_grad_() for part in (query, key, value)]
    expected = (
        attend_documents_dense(*leaves, SCALING, window, STARTS) if apart else attend_dense(*leaves, SCALING, window)
    )
    expected_gradients = torch.autograd.grad(expected, leaves, gradient)

    def lay_out(part):
        rows = part.transpose(1, 2)
        return rows.flatten(0, 1) if apart else rows

    states = tuple(lay_out(part) for part in (query, key, value))
    arguments = flash_attention._arguments(STARTS if apart else None, LENGTH, SCALING, window)
    output, log_sum_exp = forward(states, arguments)
    torch.testing.assert_close(output, lay_out(expected))
    found = backward(lay_out(gradient), states, output, log_sum_exp, arguments)
    for got, true in zip(found, expected_gradients, strict=True):
        torch.testing.assert_close(got, lay_out(true))

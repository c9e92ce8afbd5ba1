"""The chunked loss equals the model's own, in value and in every gradient."""

import pytest
import torch
from conftest import make_model

from chatmodel import losses
from chatmodel.losses import LanguageModelLoss, _plain_cross_entropy


@pytest.mark.parametrize("chunk_tokens", [1, 7, 1000])
@pytest.mark.parametrize("cap", [15.0, None])
def test_equals_the_plain_loss(chunk_tokens, cap):
    model = make_model(final_logit_softcapping=cap)
    ids = torch.randint(0, 97, (2, 24), generator=torch.Generator().manual_seed(1))
    input_ids, shift_labels = ids[:, :-1], ids[:, 1:].clone()
    shift_labels[0, 3:9] = -100
    expected = model(input_ids, labels=input_ids, shift_labels=shift_labels, use_cache=False).loss
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    loss = LanguageModelLoss(model, chunk_tokens=chunk_tokens)(input_ids, shift_labels)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("cap", [15.0, 80.0, None])
@pytest.mark.parametrize("cached", [1, 7 * 50, 10**6])
def test_blocks_of_rows_give_the_formula(cap, cached, monkeypatch):
    """Against fp64, for small logits and for ones far beyond the cap, where its slope is 0."""
    monkeypatch.setattr(losses, "CACHED_LOGITS", cached)
    torch.manual_seed(0)
    logits = torch.randn(20, 50) * torch.logspace(-2, 3, 20)[:, None]
    targets = torch.randint(50, (20,))
    targets[4] = -100
    exact = logits.double().requires_grad_()
    capped = exact if cap is None else cap * torch.tanh(exact / cap)
    expected = torch.nn.functional.cross_entropy(capped, targets, reduction="none")
    (expected_gradient,) = torch.autograd.grad(expected.sum(), exact)
    nats, gradient = _plain_cross_entropy(logits, targets, cap, True)
    torch.testing.assert_close(nats.double(), expected.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient.double(), expected_gradient, atol=2e-6, rtol=1e-4)
    assert not gradient[4].any()
    assert gradient.data_ptr() == logits.data_ptr(), "no second place for them"


def test_capped_bf16_logits_are_squashed_as_by_tanh():
    logits = torch.linspace(-60, 60, 6 * 500).view(6, 500).bfloat16()
    targets = torch.arange(6)
    exact = logits.clone().double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(15 * torch.tanh(exact / 15), targets, reduction="none")
    (expected_gradient,) = torch.autograd.grad(expected.sum(), exact)
    nats, gradient = _plain_cross_entropy(logits, targets, 15.0, True)
    torch.testing.assert_close(nats.double(), expected.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient.double(), expected_gradient, atol=1e-7, rtol=2**-8)


def test_a_logit_that_is_not_finite_shows():
    logits = torch.zeros(3, 5)
    logits[1, 2] = torch.nan
    nats, _ = _plain_cross_entropy(logits, torch.tensor([0, 1, 2]), 15.0, True)
    assert nats.isnan().tolist() == [False, True, False]


def test_nothing_scored_is_zero_and_moves_nothing():
    model = make_model()
    ids = torch.arange(10)[None]
    loss = LanguageModelLoss(model)(ids, torch.full_like(ids, -100))
    loss.backward()
    assert loss.item() == 0.0
    assert model.lm_head.weight.grad.abs().max() == 0.0


def test_no_gradient_is_computed_when_none_is_wanted():
    model = make_model()
    ids = torch.arange(10)[None]
    with torch.no_grad():
        loss = LanguageModelLoss(model)(ids, ids)
    assert not loss.requires_grad

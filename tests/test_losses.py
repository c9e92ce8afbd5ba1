"""The chunked loss equals the model's own, in value and in every gradient."""

import pytest
import torch
from conftest import make_model

from chatmodel.losses import LanguageModelLoss


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

"""Attention in blocks against a dense mask, with and without a cache; models keep their own afterwards."""

import pytest
import torch
import torch.nn.functional as F
from conftest import make_model
from torch import nn

from chatmodel.evaluation.unpadded_attention import UNPADDED_ATTENTION, attend_unpadded, attending_unpadded


@pytest.mark.parametrize("window", [None, 1, 4, 7, 30])
@pytest.mark.parametrize(("length", "seen"), [(1, 1), (9, 9), (16, 16), (23, 23), (3, 10), (1, 20)])
def test_every_query_sees_its_window(window, length, seen):
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, length, 8), torch.randn(2, 2, seen, 8), torch.randn(2, 2, seen, 8)
    output, _ = attend_unpadded(nn.Identity(), query, key, value, None, scaling=0.3, sliding_window=window)
    distance = torch.arange(seen - length, seen)[:, None] - torch.arange(seen)
    mask = (distance >= 0) & (distance < (window or seen))
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(output, expected.transpose(1, 2), atol=1e-6, rtol=1e-5)


def test_models_keep_their_own_attention():
    model = make_model()
    ids = torch.arange(40).view(1, 40)
    with torch.no_grad():
        usual = model(ids).logits
        with attending_unpadded(model):
            assert model.config._attn_implementation == UNPADDED_ATTENTION
            torch.testing.assert_close(model(ids).logits, usual, atol=1e-5, rtol=1e-5)
        assert model.config._attn_implementation == "sdpa"
    with attending_unpadded(nn.Linear(2, 2)):
        pass

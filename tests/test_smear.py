"""Smeared embeddings, which imported nanochat models have, survive every way of reading a text in pieces."""

from itertools import pairwise

import pytest
import torch
from conftest import make_model
from transformers import DynamicCache

from chatmodel import GPTConfig, GPTForCausalLM

IDS = torch.randint(1, 97, (2, 15), generator=torch.Generator().manual_seed(5))  # longer than the window of 6
SETTINGS = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(params=["SSSL", "L"])
def model(request):
    model = make_model(smear=True, window_pattern=request.param)
    model.model.smear_scale.data.fill_(0.7)
    return model


def test_each_embedding_takes_up_a_share_of_the_one_before_it():
    """By hand: gate 2 * sigmoid(0) = 1, so each normed embedding is added to the next."""
    model = make_model(smear=True).model
    model.smear_scale.data.fill_(2.0)
    model.smear_gate.weight.data.zero_()
    embeddings = torch.randn(1, 4, 64)
    smeared = model._smear(embeddings, None, torch.arange(4)[None], None)
    expected = embeddings + torch.cat([torch.zeros(1, 1, 64), embeddings[:, :-1]], dim=1)
    torch.testing.assert_close(smeared, expected)


def test_only_the_last_layer_keeps_the_last_embedding():
    config = GPTConfig(num_hidden_layers=4, smear=True)
    assert config.layer_types == ["sliding_attention"] * 3 + ["hybrid"]
    assert GPTConfig(**config.to_dict()).layer_types == config.layer_types
    assert "hybrid" not in GPTConfig(num_hidden_layers=4).layer_types


@pytest.mark.parametrize("cuts", [list(range(16)), [0, 4, 5, 15]])
def test_pieces_give_the_logits_of_the_whole(model, cuts):
    cache = DynamicCache(config=model.config)
    pieces = [model(IDS[:, a:b], past_key_values=cache).logits for a, b in pairwise(cuts)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(IDS).logits, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache_implementation": "static", "disable_compile": True},
        {"num_beams": 3},
        {"prefill_chunk_size": 4},
    ],
    ids=["cache", "static cache", "beams", "chunked prefill"],
)
def test_generation_in_every_way(model, options):
    without_cache = {"num_beams": options.get("num_beams", 1), "use_cache": False}
    expected = model.generate(IDS, **without_cache, **SETTINGS)
    assert torch.equal(model.generate(IDS, **options, **SETTINGS), expected)


def test_rejected_guesses_are_forgotten(model):
    expected = model.generate(IDS[:1], use_cache=False, **SETTINGS)
    assert torch.equal(model.generate(IDS[:1], prompt_lookup_num_tokens=3, **SETTINGS), expected)
    assert torch.equal(model.generate(IDS[:1], assistant_model=make_model(seed=4), **SETTINGS), expected)


def test_padding_and_other_documents_do_not_smear(model):
    padded = torch.cat([torch.zeros(2, 5, dtype=torch.long), IDS], dim=1)
    mask = (torch.arange(20) >= 5).long().expand(2, 20)
    torch.testing.assert_close(model(padded, attention_mask=mask).logits[:, 5:], model(IDS).logits, atol=2e-5, rtol=0)
    expected = model.generate(IDS, **SETTINGS)[:, 15:]
    assert torch.equal(model.generate(padded, attention_mask=mask, **SETTINGS)[:, 20:], expected)
    positions = torch.cat([torch.arange(9), torch.arange(6)]).expand(2, -1)
    apart = torch.cat([model(IDS[:, :9]).logits, model(IDS[:, 9:]).logits], dim=1)
    torch.testing.assert_close(model(IDS, position_ids=positions).logits, apart, atol=2e-5, rtol=0)


def test_saved_and_loaded(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert torch.equal(GPTForCausalLM.from_pretrained(tmp_path)(IDS).logits, model(IDS).logits)


def test_a_cache_without_its_place_is_refused(model):
    with pytest.raises(ValueError, match="make its cache with its config="):
        model(IDS, past_key_values=DynamicCache())
    model.config._attn_implementation = "paged|sdpa"
    with pytest.raises(ValueError, match=r"smears embeddings; the cache of 'paged\|sdpa' cannot hold"):
        model.model(IDS, use_cache=False)

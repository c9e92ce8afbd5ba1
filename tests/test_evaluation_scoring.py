"""Batches, prompts as ids, and the limits of a model's context."""

import pytest
import torch
from conftest import make_model
from transformers import GPT2Config, GPT2LMHeadModel

from chatmodel.evaluation.scoring import (
    encode_texts,
    evaluation_mode,
    find_hard_limit,
    fits_context,
    get_start_token,
    pad_right,
    plan_batches,
)
from chatmodel.runtime import UserError


@pytest.fixture(scope="module")
def model():
    return make_model(vocab_size=50)


def test_models_mode_is_restored(model):
    model.train()
    with evaluation_mode(model):
        assert not model.training
        assert not torch.is_grad_enabled()
    assert model.training
    model.eval()


def test_batches_hold_the_budget_and_every_index_once():
    lengths = [5, 100, 7, 7, 3, 50, 6]
    batches = plan_batches(lengths, batch_tokens=60)
    assert batches == [[1], [5], [2, 3, 6, 0, 4]]
    assert sorted(index for batch in batches for index in batch) == list(range(7))
    assert plan_batches([], batch_tokens=10) == []


def test_padding_goes_to_the_right():
    assert pad_right([[7, 8], [9]], device=torch.device("cpu")).tolist() == [[7, 8], [9, 0]]


class FakeTokenizer:
    """Letters are tokens; what it was asked for is kept."""

    def __init__(self, bos=None, eos=None):
        self.bos_token_id, self.eos_token_id = bos, eos

    def __call__(self, texts, *, add_special_tokens, split_special_tokens, **rest):
        assert (add_special_tokens, split_special_tokens) == (False, True)
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}


def test_texts_begin_with_the_start_token():
    assert encode_texts(FakeTokenizer(bos=1, eos=2), ["ab", ""]) == [[1, 97, 98], [1]]
    assert get_start_token(FakeTokenizer(eos=0)) == 0
    with pytest.raises(UserError, match="neither bos_token nor eos_token"):
        get_start_token(FakeTokenizer())


def test_learned_positions_are_a_hard_limit(model):
    assert find_hard_limit(model) is None
    assert (
        find_hard_limit(GPT2LMHeadModel(GPT2Config(vocab_size=9, n_positions=8, n_embd=4, n_layer=1, n_head=1))) == 8
    )
    assert fits_context(model, [0] * 63)
    assert not fits_context(model, [0] * 64)

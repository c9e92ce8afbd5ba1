"""Batched scoring against one-by-one scoring with plain log-softmax."""

import math

import pytest
import torch
from conftest import make_model
from transformers import GPT2Config, GPT2LMHeadModel

from chatmodel.evaluation.scoring import (
    Request,
    encode_texts,
    evaluation_mode,
    find_hard_limit,
    fits_context,
    get_start_token,
    pad_right,
    plan_batches,
    score_requests,
)
from chatmodel.runtime import UserError


@pytest.fixture(scope="module")
def model():
    return make_model(vocab_size=50)


def score_alone(model, request):
    """The definition: mean of -log p(token | before) over the scored tokens, and whether each is the argmax."""
    with torch.no_grad():
        logits = model(torch.tensor([request.tokens]), use_cache=False).logits[0]
    log_probabilities = logits.log_softmax(dim=-1)
    scored = range(request.start, len(request.tokens))
    losses = [-log_probabilities[t - 1, request.tokens[t]].item() for t in scored]
    greedy = all(logits[t - 1].argmax().item() == request.tokens[t] for t in scored)
    return sum(losses) / len(losses), greedy


@pytest.mark.parametrize("batch_tokens", [1, 40, 10_000])
def test_batches_give_what_each_request_gives_alone(model, batch_tokens):
    generator = torch.Generator().manual_seed(1)
    requests = []
    for length, start in [(3, 1), (17, 15), (9, 4), (30, 29), (2, 1), (17, 3), (12, 11)]:
        tokens = torch.randint(0, 50, (length,), generator=generator).tolist()
        requests.append(Request(tuple(tokens), start))
    # One continuation that the model itself would choose.
    greedy = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False, eos_token_id=None)[0]
    requests.append(Request(tuple(greedy.tolist()), 3))
    scores = score_requests(model, requests, batch_tokens=batch_tokens)
    for request, score in zip(requests, scores, strict=True):
        loss, is_greedy = score_alone(model, request)
        assert score.mean_loss == pytest.approx(loss, abs=1e-5)
        assert score.is_greedy == is_greedy
    assert scores[-1].is_greedy
    assert sum(score.is_greedy for score in scores) < len(scores)


def test_equal_requests_tie_exactly_and_nothing_scored_is_nan(model):
    request, other = Request((1, 2, 3), 2), Request((1, 2, 3, 4, 5, 6), 2)
    first, _, second, empty = score_requests(model, [request, other, request, Request((1, 2), 2)], batch_tokens=64)
    assert first == second
    assert math.isnan(empty.mean_loss)


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

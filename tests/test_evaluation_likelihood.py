"""Batched scoring, with and without shared beginnings, against one-by-one scoring with plain log-softmax."""

import math

import pytest
import torch
from conftest import make_model
from transformers import AutoConfig, AutoModelForCausalLM

from chatmodel.evaluation.likelihood import (
    can_share_prefixes,
    fill_cache,
    find_sharing_fault,
    fork_cache,
    score_requests,
)
from chatmodel.evaluation.scoring import Request


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


def make_questions(sizes=(40, 3, 61, 41), vocabulary=50):
    """Questions of some lengths with four choices each, the last of which equals the first."""
    generator = torch.Generator().manual_seed(2)
    requests = []
    for size in sizes:
        draw = [torch.randint(0, vocabulary, (n,), generator=generator).tolist() for n in (size, 1, 5, 2)]
        requests += [Request((*draw[0], *draw[end]), size) for end in (1, 2, 3, 1)]
    return requests


def tiny(kind, **changes):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(shape | changes)))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


MODELS = {
    "ours": lambda: make_model(vocab_size=50),
    "ours, long window": lambda: make_model(vocab_size=50, sliding_window=20),
    "ours, smeared": lambda: make_model(vocab_size=50, smear=True),
    "gpt2": lambda: tiny("gpt2", n_positions=128),
    "llama": lambda: tiny("llama", intermediate_size=64, num_key_value_heads=1),
    "mistral, window": lambda: tiny("mistral", intermediate_size=64, num_key_value_heads=1, sliding_window=8),
    "gemma2": lambda: tiny("gemma2", intermediate_size=64, num_key_value_heads=1, head_dim=16, sliding_window=8),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch_tokens", [90, 10_000])
def test_shared_beginnings_change_nothing(name, batch_tokens, caplog):
    model, requests = MODELS[name](), make_questions()
    shared = score_requests(model, requests, batch_tokens=batch_tokens)
    assert [record for record in caplog.records if record.name == "chatmodel"] == []
    for request, score in zip(requests, shared, strict=True):
        loss, is_greedy = score_alone(model, request)
        assert score.mean_loss == pytest.approx(loss, abs=1e-5)
        assert score.is_greedy == is_greedy
    assert all(shared[n] == shared[n + 3] for n in range(0, len(shared), 4))  # equal choices tie exactly


def test_a_shared_beginning_is_computed_once():
    model, requests = MODELS["llama"](), make_questions((40, 40))
    assert can_share_prefixes(model)
    seen = []
    count = lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel())  # noqa: E731
    model.register_forward_pre_hook(count, with_kwargs=True)
    score_requests(model, requests, batch_tokens=10_000)
    assert seen == [2 * 39, 6 * 6]  # both questions but their last token; six distinct choices, padded to the longest


def test_a_model_without_a_usable_cache_is_scored_whole_and_that_is_said_once(caplog):
    model, requests = MODELS["llama"](), make_questions()
    expected = score_requests(model, requests, batch_tokens=500)
    whole = MODELS["llama"]()
    forward = whole.forward

    def forget(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.past_key_values = None
        return output

    whole.forward = forget
    for _ in range(2):
        scores = score_requests(whole, requests, batch_tokens=500)
    assert [s.mean_loss for s in scores] == pytest.approx([s.mean_loss for s in expected], abs=1e-5)
    assert [record.message for record in caplog.records if "cannot be copied" in record.message] != []
    assert len(caplog.records) == 1


def test_a_cache_that_goes_on_wrongly_is_noticed():
    model = MODELS["llama"]()
    forward = model.forward

    def shift(*args, past_key_values=None, **kwargs):
        """Continues as if nothing had come before."""
        return forward(*args, **kwargs)

    model.forward = shift
    assert "differ by" in find_sharing_fault(model)


def test_forks_leave_their_origin_as_it_is():
    model = make_model(vocab_size=50, smear=True)
    ids = torch.arange(20).view(2, 10)
    with torch.no_grad():
        cache = fill_cache(model, ids)
        first = model(ids[:1, :3], past_key_values=fork_cache(cache, torch.tensor([1])), use_cache=True).logits
        again = model(ids[:1, :3], past_key_values=fork_cache(cache, torch.tensor([1])), use_cache=True).logits
    assert cache.get_seq_length() == 10
    assert torch.equal(first, again)

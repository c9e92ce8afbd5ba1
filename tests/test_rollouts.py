"""Completions during training: repeatable, from the weights as they are, in memory that stays."""

import pytest
import torch
from conftest import make_model

from chatmodel.conversations.render import render_prompt
from chatmodel.generation import generate_replies
from chatmodel.rollouts import Sampler, check_lengths, draw_seeds
from chatmodel.runtime import UserError
from chatmodel.tokenizer import calculator_table


@pytest.fixture(scope="module")
def model(tokenizer):
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 96}
    return make_model(calculator=calculator_table(tokenizer), **sizes).eval()


@pytest.fixture
def prompts(tokenizer):
    questions = ("What is 2 + 2?", "What is 2 + 2?", "Spell it", "7")
    return [render_prompt(tokenizer, [{"role": "user", "content": question}]) for question in questions]


def make_sampler(model, tokenizer, **changes):
    options = {"max_new_tokens": 12, "temperature": 1.0, "rows": 3, "longest_prompt": 40, "seed": 5}
    return Sampler(model, tokenizer, **(options | changes))


def test_near_zero_temperature_is_greedy_generation(model, tokenizer, prompts):
    expected = generate_replies(model, tokenizer, prompts, max_new_tokens=12, keep_end=True)
    sampler = make_sampler(model, tokenizer, temperature=1e-5)
    assert [[each.ids] for each in sampler.sample(prompts, "0")] == expected


def test_a_place_draws_the_same_again_and_another_does_not(model, tokenizer, prompts):
    first = [each.ids for each in make_sampler(model, tokenizer).sample(prompts, "0 4")]
    torch.rand(5)
    sampler = make_sampler(model, tokenizer, rows=4)
    assert [each.ids for each in sampler.sample(prompts, "0 4")] == first
    assert [each.ids for each in sampler.sample(prompts, "0 5")] != first
    assert first[0] != first[1], "equal prompts drew the same"
    assert sampler.tokens == 2 * sum(map(len, first))  # whatever was drawn, all have the full length


def test_log_probabilities_are_the_models(model, tokenizer, prompts):
    sampler = make_sampler(model, tokenizer, temperature=0.7, top_k=20)
    for prompt, completion in zip(prompts, sampler.sample(prompts, "0"), strict=True):
        ids = torch.tensor([prompt + completion.ids])
        logits = model(ids).logits[0, len(prompt) - 1 : -1] / 0.7
        logits[:, model.config.calculator["output_start"]] = float("-inf")
        expected = logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]
        assert len(completion.logps) == len(completion.ids)
        torch.testing.assert_close(torch.tensor(completion.logps), expected, atol=1e-4, rtol=1e-4)


def test_memory_is_kept_and_weights_are_taken_over(model, tokenizer, prompts):
    sampler = make_sampler(model, tokenizer, temperature=1e-5)
    before = [each.ids for each in sampler.sample(prompts, "0")]
    decoder = sampler._decoder
    places = [cache.keys.data_ptr() for cache in decoder.state.caches]
    kept = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-0.9)
    after = [each.ids for each in sampler.sample(prompts, "0")]
    expected = generate_replies(model, tokenizer, prompts, max_new_tokens=12, keep_end=True)
    assert [[ids] for ids in after] == expected
    assert after != before
    assert sampler._decoder is decoder
    assert places == [cache.keys.data_ptr() for cache in decoder.state.caches]
    with torch.no_grad():
        for parameter, old in zip(model.parameters(), kept, strict=True):
            parameter.copy_(old)


def test_models_without_an_engine_draw_repeatably_too(tokenizer, prompts):
    model = make_model(vocab_size=len(tokenizer), max_position_embeddings=96, smear=True)
    state = torch.get_rng_state()
    first = make_sampler(model, tokenizer).sample(prompts, "1")
    assert (torch.get_rng_state() == state).all()
    assert [each.ids for each in make_sampler(model, tokenizer).sample(prompts, "1")] == [each.ids for each in first]
    assert not any(each.logps for each in first)


def test_seeds_follow_from_the_place():
    assert draw_seeds("a", 3) == draw_seeds("a", 3)
    assert draw_seeds("a", 3)[:2] == draw_seeds("a", 2)
    assert len({*draw_seeds("a", 500), *draw_seeds("b", 500)}) == 1000
    assert all(0 <= seed < 2**62 for seed in draw_seeds("c", 500))


def test_completions_have_to_fit_the_context(model):
    check_lengths(model, 40, 56)
    with pytest.raises(UserError, match="max_completion_length=57 does not fit"):
        check_lengths(model, 40, 57)
    with pytest.raises(UserError, match="the longest prompt has 96 tokens, but the model's context holds 96"):
        check_lengths(model, 96, 1)

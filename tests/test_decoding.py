"""The engine gives the tokens of plain `generate`, whatever stands beside a prompt; kernels are tested on a GPU."""

import gc
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial

import pytest
import torch
from conftest import make_model
from parrot import make_parrot
from torch import nn

from chatmodel.decoding import pool
from chatmodel.decoding.engine import Decoder, Request
from chatmodel.decoding.pool import Engine, find_engine
from chatmodel.decoding.sampling import Sampling, choose
from chatmodel.decoding.state import DecodingState, draw_uniform
from chatmodel.decoding.steps import GraphedSteps, PlainSteps
from chatmodel.decoding.weights import DecoderWeights, find_obstacle
from chatmodel.generation import build_generation_config, generate_replies, stream_reply

SHAPES = {
    "extras": {},
    "plain": {"window_pattern": "L", "value_embeddings": False, "residual_scalars": False, "backout": False},
    "gated": {"gated_mlp": True, "hidden_act": "silu", "final_logit_softcapping": None, "tie_word_embeddings": True},
    "one window": {"num_hidden_layers": 1, "layer_types": ["sliding_attention"], "num_key_value_heads": 4},
}
LENGTHS = (3, 40, 11, 5, 7, 1, 60)
CALL = "<|python_start|>12+30<|python_end|>"
CALL_AND_RESULT = f"{CALL}<|output_start|>42<|output_end|>"


def make_prompts(lengths=LENGTHS, vocab_size=97):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, vocab_size, (length,), generator=generator).tolist() for length in lengths]


class LaggingSteps(PlainSteps):
    """Four steps a call and sizes of powers of two, with the tokens seen one call later: as on a GPU."""

    lag = 1
    size = GraphedSteps.size

    def run(self, count, sampling, *, longest, even):
        step = partial(super().run, count, sampling, longest=self.state.length - 1, even=False)
        emitted, logps = zip(*(step() for _ in range(4)), strict=True)
        return torch.cat(emitted), torch.cat(logps) if sampling.scored else None


def decode(model, prompts, *, rows, sampling=None, ends=(), max_new_tokens=20, dtype=torch.float32, steps=PlainSteps):
    context = model.config.max_position_embeddings
    requests = [Request(p, min(max_new_tokens, context - len(p)), seed) for seed, p in enumerate(prompts)]
    replies = [[] for _ in prompts]
    weights = DecoderWeights(model, dtype)
    state = DecodingState(weights, rows=rows, length=context, longest_forced=80)
    for progress in Decoder(weights, steps(weights, state, ends)).decode(requests, sampling or Sampling()):
        assert progress.ids
        replies[progress.index] += progress.ids
    return replies


def generate(model, prompts, *, ends=(), max_new_tokens=20):
    """By Transformers, prompt by prompt."""
    options = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": max_new_tokens, "eos_token_id": list(ends)}
    batches = [torch.tensor([prompt]) for prompt in prompts]
    outputs = [model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0] for ids in batches]
    return [output[len(prompt) :].tolist() for output, prompt in zip(outputs, prompts, strict=True)]


@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_are_those_of_generate(shape):
    """Mixed lengths, within, at and beyond the windows and up to the end of the context; rows are filled again."""
    model = make_model(**SHAPES[shape])
    assert find_obstacle(model) is None
    expected = generate(model, make_prompts())
    assert decode(model, make_prompts(), rows=3) == expected
    assert decode(model, make_prompts(), rows=1) == expected
    assert decode(model, make_prompts(), rows=4, steps=LaggingSteps) == expected


@pytest.mark.slow
def test_fifty_prompts_with_windows_and_the_calculator(chat_model, tokenizer):
    prompts = make_prompts(range(1, 201, 4), vocab_size=300)
    call = tokenizer.encode(CALL_AND_RESULT, add_special_tokens=False)
    for index, prompt in enumerate(prompts[10:40]):  # ended before, within and after a call and its result
        prompt[-len(call) :] = call[: 1 + index % len(call)]
    ends = [tokenizer.eos_token_id, tokenizer.bos_token_id]
    expected = generate(chat_model, prompts, ends=ends, max_new_tokens=40)
    assert decode(chat_model, prompts, rows=16, ends=ends, max_new_tokens=40) == expected


def test_the_calculator_answers_within_a_batch(tokenizer):
    """Rows that call it stand beside rows that do not, and each goes on with its own result."""
    model = make_parrot(tokenizer, f"is {CALL}", "so it<|assistant_end|>", 64)
    settings = build_generation_config(tokenizer, max_new_tokens=30)
    texts = (
        "<|bos|><|assistant_start|>",
        "<|bos|>so",
        "<|bos|>7 <|python_start|>2*3",
        "<|bos|><|python_start|>",
        CALL,
    )
    prompts = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    expected = generate(model, prompts, ends=settings.eos_token_id, max_new_tokens=30)
    for rows in (1, 2, 5):
        for steps in (PlainSteps, LaggingSteps):
            options = {"ends": settings.eos_token_id, "max_new_tokens": 30, "steps": steps}
            assert decode(model, prompts, rows=rows, **options) == expected
    assert tokenizer.decode(expected[0]) == f"is {CALL_AND_RESULT}so it<|assistant_end|>"
    (reply,) = generate_replies(model, tokenizer, prompts[:1], max_new_tokens=30)
    assert tokenizer.decode(reply[0]) == f"is {CALL_AND_RESULT}so it"


def test_a_limit_within_a_result(tokenizer):
    model = make_parrot(tokenizer, f"is {CALL}", "so it<|assistant_end|>", 64)
    prompts = [tokenizer.encode("<|assistant_start|>", add_special_tokens=False)] * 12
    requests = [Request(prompt, limit + 1) for limit, prompt in enumerate(prompts)]
    replies = [[] for _ in requests]
    for progress in Engine(model, torch.float32).decode(requests, Sampling(), end_ids=(), rows=5):
        replies[progress.index] += progress.ids
        assert progress.done == (len(replies[progress.index]) == progress.index + 1)
    (longest,) = generate(model, prompts[:1], max_new_tokens=12)
    assert replies == [longest[: limit + 1] for limit in range(12)]


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.7, 20), Sampling(1.0, None, 0.8)])
def test_a_row_draws_the_same_beside_any_neighbours(sampling):
    model = make_model()
    alone = decode(model, make_prompts(), rows=1, sampling=sampling)
    assert decode(model, make_prompts(), rows=7, sampling=sampling) == alone
    assert alone != decode(model, make_prompts(), rows=1)


def test_samples_of_one_prompt_differ(chat_model, tokenizer):
    """Its tokens are read once, its draws are each sample's own."""
    replies = generate_replies(
        chat_model, tokenizer, [[5, 6]], max_new_tokens=6, temperature=1.0, num_samples=8, seed=1
    )
    assert len({tuple(reply) for reply in replies[0]}) == 8


def test_draws_follow_the_probabilities():
    logits = torch.log(torch.tensor([0.05, 0.5, 0.0, 0.15, 0.3]))
    uniform = draw_uniform(torch.arange(20_000) * 7919, torch.arange(20_000) % 13)

    def shares(sampling):
        counts = Counter(choose(logits.expand(20_000, -1), sampling, uniform).tolist())
        return [counts[token] / 20_000 for token in range(5)]

    near = {"abs": 0.012}
    assert shares(Sampling(1.0)) == pytest.approx([0.05, 0.5, 0.0, 0.15, 0.3], **near)
    assert shares(Sampling(1.0, top_k=2)) == pytest.approx([0, 0.625, 0, 0, 0.375], **near)
    assert shares(Sampling(1.0, top_p=0.79)) == pytest.approx([0, 0.625, 0, 0, 0.375], **near)
    assert shares(Sampling(1.0, top_p=0.81)) == pytest.approx([0, 0.5 / 0.95, 0, 0.15 / 0.95, 0.3 / 0.95], **near)
    roots = torch.tensor([0.05, 0.5, 0.0, 0.15, 0.3]).sqrt()
    assert shares(Sampling(2.0)) == pytest.approx((roots / roots.sum()).tolist(), **near)


def test_uniform_numbers_fill_the_interval():
    draws = draw_uniform(torch.full((4000,), 3), torch.arange(4000))
    assert draws.min() >= 0
    assert draws.max() < 1
    assert torch.histc(draws, 10, 0, 1).tolist() == pytest.approx([400] * 10, abs=80)


def test_trained_weights_are_taken_over():
    model = make_model()
    before = find_engine(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-0.9)
    engine = find_engine(model)
    assert engine is before
    replies = [p.ids for p in engine.decode([Request([5, 6, 7], 1)], Sampling(), end_ids=(), rows=1)]
    assert replies == generate(model, [[5, 6, 7]], max_new_tokens=1)
    model.to(torch.bfloat16)
    assert find_engine(model) is not before


def test_an_engine_ends_with_its_model():
    model = make_model()
    find_engine(model)
    gc.collect()  # of other tests' models
    count = len(pool._ENGINES)
    del model
    gc.collect()
    assert len(pool._ENGINES) == count - 1


def test_a_closed_stream_leaves_the_engine_clean(chat_model, tokenizer):
    messages = [{"role": "user", "content": "What is 12 plus 30?"}]
    expected = "".join(stream_reply(chat_model, tokenizer, messages, max_new_tokens=10))
    with closing(stream_reply(chat_model, tokenizer, messages, max_new_tokens=30)) as stream:
        next(stream)
        # Another stream begins while the first is open.
        assert "".join(stream_reply(chat_model, tokenizer, messages, max_new_tokens=10)) == expected
    assert "".join(stream_reply(chat_model, tokenizer, messages, max_new_tokens=10)) == expected


def test_streams_in_threads_do_not_meet(chat_model, tokenizer):
    questions = [[{"role": "user", "content": f"What is {n} plus 30?"}] for n in range(6)]
    expected = ["".join(stream_reply(chat_model, tokenizer, q, max_new_tokens=12)) for q in questions]
    with ThreadPoolExecutor(6) as threads:
        found = threads.map(lambda q: "".join(stream_reply(chat_model, tokenizer, q, max_new_tokens=12)), questions)
        assert list(found) == expected


def test_a_trainers_autocast_changes_nothing():
    model = make_model()
    expected = decode(model, make_prompts(), rows=4)
    with torch.autocast("cpu", torch.bfloat16):
        assert decode(model, make_prompts(), rows=4) == expected


def test_bf16_weights_decode():
    model = make_model().to(torch.bfloat16)
    replies = decode(model, make_prompts(), rows=4, dtype=torch.bfloat16)
    assert [len(reply) for reply in replies] == [20, 20, 20, 20, 20, 20, 4]


def test_other_models_go_through_generate(chat_model, tokenizer, caplog):
    class Adapter(nn.Linear):
        pass

    model = make_model(vocab_size=len(tokenizer), smear=True)
    assert "smears" in find_obstacle(model)
    model = make_model(vocab_size=len(tokenizer))
    model.model.layers[0].mlp.up_proj.__class__ = Adapter
    assert find_obstacle(model) == "model.layers.0.mlp.up_proj is a Adapter"
    with caplog.at_level("WARNING", logger="chatmodel"):
        for _ in range(2):
            replies = generate_replies(model, tokenizer, [[5, 6], [7]], max_new_tokens=3, keep_end=True)
    assert sum("up_proj is a Adapter" in record.message for record in caplog.records) == 1
    assert all(reply for (reply,) in replies)

"""On a CUDA device: kernels and captured graphs decode what plain PyTorch does."""

import pytest
import torch
from conftest import make_model

from chatmodel.decoding.engine import Decoder, Request
from chatmodel.decoding.pool import Engine
from chatmodel.decoding.sampling import Sampling
from chatmodel.decoding.state import DecodingState
from chatmodel.decoding.steps import GraphedSteps, PlainSteps
from chatmodel.tokenizer import calculator_table

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
LENGTHS = [3, 200, 64, 1, 5, 130, 33, 90, 17, 250, 64, 7, 8, 9, 10, 11, 12, 13, 14, 15]
SHAPES = {
    "extras": {},
    "plain": {"window_pattern": "L", "value_embeddings": False, "residual_scalars": False, "backout": False},
    "gated": {"gated_mlp": True, "hidden_act": "silu", "final_logit_softcapping": None},
}


def build(**changes):
    sizes = {
        "hidden_size": 256,
        "head_dim": 64,
        "vocab_size": 512,
        "max_position_embeddings": 320,
        "sliding_window": 48,
    }
    model = make_model(**(sizes | changes)).cuda()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "embed" not in name:
            parameter.data *= 0.3  # near the sizes of training
    return model


def make_requests(count=20):
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(0, 512, (length,), generator=generator).tolist() for length in LENGTHS[:count]]
    return [Request(prompt, min(24, 320 - len(prompt)), seed) for seed, prompt in enumerate(prompts)]


def decode(model, requests, *, rows, sampling=Sampling(), steps=GraphedSteps, **options):  # noqa: B008 (frozen)
    weights = Engine(model, next(model.parameters()).dtype).weights
    decoder = Decoder(
        weights, steps(weights, DecodingState(weights, rows=rows, length=320, longest_forced=80), (), **options)
    )
    replies = [[] for _ in requests]
    for progress in decoder.decode(requests, sampling):
        replies[progress.index] += progress.ids
    return replies


@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_give_the_tokens_of_plain_pytorch(shape):
    """In fp32; 1 and 2 rows, up to 16, and more have kernels of their own."""
    model, requests = build(**SHAPES[shape]), make_requests()
    expected = decode(model, requests, rows=4, steps=PlainSteps)
    for rows in (1, 2, 5, 20):
        assert decode(model, requests, rows=rows) == expected, rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_captured_graph_repeats_the_kernels(dtype):
    model, requests = build().to(dtype), make_requests()
    for sampling in (Sampling(), Sampling(0.8, 50), Sampling(1.0, None, 0.9)):
        for rows in (1, 8, 20):
            launched = decode(model, requests, rows=rows, sampling=sampling, captures=False)
            assert decode(model, requests, rows=rows, sampling=sampling) == launched, (rows, sampling)


def test_a_row_draws_the_same_beside_any_neighbours():
    model, requests = build(), make_requests()
    together = decode(model, requests, rows=20, sampling=Sampling(1.0, 40))
    assert decode(model, requests, rows=3, sampling=Sampling(1.0, 40)) == together


def test_tokens_equal_generate_on_the_device():
    model, requests = build(), make_requests(8)
    replies = decode(model, requests, rows=8)
    for request, reply in zip(requests, replies, strict=True):
        ids = torch.tensor([request.prompt], device="cuda")
        options = {"max_new_tokens": request.max_new_tokens, "do_sample": False, "pad_token_id": 0}
        output = model.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=[], **options)
        assert output[0, ids.shape[1] :].tolist() == reply


def test_the_calculator_does_not_stop_the_batch(tokenizer):
    model = build(vocab_size=len(tokenizer), calculator=calculator_table(tokenizer))
    call = "<|bos|><|assistant_start|><|python_start|>12+30<|python_end|>"
    prompts = [tokenizer.encode(text, add_special_tokens=False) for text in (call, "<|bos|>the library", "<|bos|>x")]
    prompts.append(prompts[0][:-1])
    requests = [Request(prompt, 12) for prompt in prompts]
    expected = decode(model, requests, rows=4, steps=PlainSteps)
    assert decode(model, requests, rows=4) == expected
    assert tokenizer.decode(expected[0]).startswith("<|output_start|>42<|output_end|>")


def test_log_probabilities_come_with_the_tokens():
    """The same from plain PyTorch and from graphs, and again when the graphs are there already."""
    model, requests = build(), make_requests(8)
    sampling = Sampling(1.0, 40, scored=True)
    weights = Engine(model, torch.float32).weights
    found = {}
    for name, steps, options in (("plain", PlainSteps, {}), ("graphs", GraphedSteps, {})):
        state = DecodingState(weights, rows=8, length=320, longest_forced=80)
        decoder = Decoder(weights, steps(weights, state, (), **options))
        for turn in range(2):
            for progress in decoder.decode(requests, sampling):
                logps = found.setdefault((name, turn, progress.index), [])
                logps += progress.logps
                assert len(progress.logps) == len(progress.ids)
    for turn in range(2):
        for index in range(8):
            expected = torch.tensor(found["plain", turn, index])
            torch.testing.assert_close(torch.tensor(found["graphs", turn, index]), expected, atol=1e-3, rtol=1e-3)

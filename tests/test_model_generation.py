"""Every way to generate gives the same tokens, and none leaves the context or the vocabulary."""

import pytest
import torch
from conftest import make_model
from transformers import CompileConfig, ContinuousBatchingConfig, GenerationConfig

from chatmodel.generation import generate_replies, stream_reply
from chatmodel.model.calculator_batching import FREE, RESULT_AFTER_CALL, ForcedTokens, RequestCalculator
from chatmodel.runtime import UserError

PLAIN = {"window_pattern": "L", "value_embeddings": False, "residual_scalars": False, "backout": False}
GREEDY = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 16}
SMALL_CACHE = ContinuousBatchingConfig(page_size=16, num_blocks=48, max_batch_tokens=64)
CALL = "<|bos|><|user_start|>12+30?<|user_end|><|assistant_start|><|python_start|>12+30<|python_end|>"


def random_ids(*shape, seed=1):
    return torch.randint(0, 97, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["extras", "plain"], scope="module")
def model(request):
    return make_model(**({} if request.param == "extras" else PLAIN))


@pytest.fixture(scope="module")
def expected(model):
    """Without a cache, the whole text is read again for every token: the truth for all other ways."""
    return model.generate(random_ids(2, 13), use_cache=False, **GREEDY)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache_implementation": "static", "disable_compile": True},
        {"prefill_chunk_size": 4},
    ],
    ids=lambda options: "-".join(map(str, options)) or "dynamic",
)
def test_caches_give_the_same_tokens(model, expected, options):
    assert torch.equal(model.generate(random_ids(2, 13), **GREEDY, **options), expected)


def test_a_compiled_static_cache_gives_the_same_tokens(model, expected):
    tracing = CompileConfig(fullgraph=True, backend="eager", mode=None)
    tracing._compile_all_devices = True  # Transformers compiles on accelerators only, unless told so
    found = model.generate(random_ids(2, 13), cache_implementation="static", compile_config=tracing, **GREEDY)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("helper", ["prompt lookup", "itself", "another model"])
def test_assisted_decoding_gives_the_same_tokens(model, expected, helper):
    options = {
        "prompt lookup": {"prompt_lookup_num_tokens": 3},
        "itself": {"assistant_model": model},
        "another model": {"assistant_model": make_model(seed=5, num_hidden_layers=1)},
    }[helper]
    for row in range(2):
        found = model.generate(random_ids(2, 13)[row : row + 1], **GREEDY, **options)
        assert torch.equal(found[0], expected[row])


def test_beams_with_and_without_a_cache(model):
    settings = GREEDY | {"num_beams": 3, "num_return_sequences": 2, "eos_token_id": 9}
    without = model.generate(random_ids(2, 13), use_cache=False, **settings)
    assert torch.equal(model.generate(random_ids(2, 13), **settings), without)


def test_mixed_lengths_in_one_batch(model):
    prompts = [random_ids(length, seed=length) for length in (3, 11, 7)]
    padded = torch.stack([torch.cat([torch.zeros(11 - len(p), dtype=torch.long), p]) for p in prompts])
    mask = torch.stack([(torch.arange(11) >= 11 - len(p)).long() for p in prompts])
    together = model.generate(padded, attention_mask=mask, **GREEDY)[:, 11:]
    alone = [model.generate(p[None], attention_mask=torch.ones(1, len(p)), **GREEDY)[0, len(p) :] for p in prompts]
    assert torch.equal(together, torch.stack(alone))


def test_continuous_batching_gives_the_same_tokens(chat_model, tokenizer):
    """With windows, the calculator, and prompts that begin and end in the middle of a call."""
    call = tokenizer.encode(CALL, add_special_tokens=False)
    prompts = [call, tokenizer.encode("The library of the"), call[:-1], [5]]
    settings = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=[], pad_token_id=0)
    expected = [
        chat_model.generate(torch.tensor([p]), attention_mask=torch.ones(1, len(p)), generation_config=settings)[0]
        for p in prompts
    ]
    found = chat_model.generate_batch(prompts, settings, SMALL_CACHE)
    assert [[*p, *o.generated_tokens] for p, o in zip(prompts, found.values(), strict=True)] == [
        ids.tolist() for ids in expected
    ]
    first = tokenizer.decode(next(iter(found.values())).generated_tokens)
    assert first.startswith("<|output_start|>42<|output_end|>")


class Request:
    """What a processor sees of a request: `behind` tokens were drawn that only the device knows yet."""

    def __init__(self, ids, behind=0):
        self.state = self
        self.initial_tokens, self.generated_tokens, self.position_offset = ids[:3], ids[3:], len(ids) + behind


@pytest.mark.parametrize("behind", [0, 1])
def test_the_calculator_keeps_up_with_overlapping_batches(chat_model, tokenizer, behind):
    """Wherever a request stands, the same tokens may follow as in `generate`, though the last may not be known."""
    text = (
        "<|bos|>a <|python_start|>12+30<|python_end|><|output_start|>42<|output_end|>b<|python_start|>x<|python_end|>"
    )
    ids = tokenizer.encode(text, add_special_tokens=False)
    (regular,) = chat_model._get_logits_processor(GenerationConfig())
    requests = RequestCalculator(regular)
    write = ForcedTokens(requests)
    lengths = range(4, len(ids) + 1)
    arguments = requests.prepare_tensor_args([Request(ids[: n - behind], behind) for n in lengths])
    scores = torch.randn(len(lengths), len(tokenizer))
    found = write(torch.tensor([ids[n - 1] for n in lengths]), requests(scores, arguments))
    for row, n in enumerate(lengths):
        assert torch.equal(found[row : row + 1], regular(torch.tensor([ids[:n]]), scores[row : row + 1])), n
    assert {FREE, *ids[-3:]} & set(arguments.tolist())
    assert (RESULT_AFTER_CALL in arguments.tolist()) == bool(behind)


# A context of 64 tokens and a vocabulary of 97.
BAD_PROMPTS = [
    ([[1] * 64], "has 64 tokens, but the model's context holds 64"),
    ([[]], "the prompt is empty"),
    ([[5, 97]], "has the id 97, but the model's vocabulary ends at 96"),
    ([[-1, 5]], "has the id -1"),
]


@pytest.mark.parametrize(("prompt", "sentence"), BAD_PROMPTS)
def test_bad_prompts_are_refused(model, prompt, sentence):
    with pytest.raises(ValueError, match=sentence):
        model.generate(torch.tensor(prompt, dtype=torch.long), **GREEDY)
    with pytest.raises(ValueError, match=sentence):
        model.generate_batch([[3, 4], *prompt], GenerationConfig(**GREEDY), SMALL_CACHE)


def test_generation_ends_with_the_context(model):
    assert model.generate(random_ids(1, 60), **GREEDY).shape == (1, 64)
    assert model.generate(random_ids(1, 60), max_length=500, do_sample=False, pad_token_id=0).shape == (1, 64)
    embeddings = model.get_input_embeddings()(random_ids(1, 60))
    assert model.generate(inputs_embeds=embeddings, **GREEDY).shape == (1, 4)
    settings = GenerationConfig(**GREEDY, eos_token_id=[])
    outputs = model.generate_batch([[3] * 60, [3] * 5], settings, SMALL_CACHE)
    assert [len(output.generated_tokens) for output in outputs.values()] == [4, 16]


@pytest.mark.parametrize(
    ("prompt", "sentence"), [([], "empty"), ([5, 512], "id 512"), ([5] * 256, "context holds 256")]
)
def test_replies_to_bad_prompts_are_refused(chat_model, tokenizer, prompt, sentence):
    with pytest.raises((UserError, ValueError), match=sentence):
        generate_replies(chat_model, tokenizer, [[5, 6], prompt], max_new_tokens=2)


def test_an_empty_question_is_refused(chat_model, tokenizer):
    with pytest.raises(UserError, match=r"message 1 .* is empty"):
        next(stream_reply(chat_model, tokenizer, [{"role": "user", "content": " "}]))

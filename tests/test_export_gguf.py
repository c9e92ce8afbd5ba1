"""A GGUF file holds the model, its tokenizer and its chat template as llama.cpp wants them.

The comparisons with readers need packages of the extra "export" (gguf) and, for llama.cpp itself, xllamacpp.
"""

import json
import random
import sys
import urllib.request
from pydoc_data.topics import topics

import pytest
import torch
from conftest import make_model

from chatmodel.checkpoint import save_model_folder
from chatmodel.export.exports import export_model
from chatmodel.export.folders import load_own_model
from chatmodel.export.gguf_file import find_pre_tokenizer, gguf_name
from chatmodel.runtime import UserError, read_json
from chatmodel.tokenizer import SPECIAL_TOKENS, load_tokenizer, train_tokenizer

COMPAT = {
    "window_pattern": "L",
    "value_embeddings": False,
    "residual_scalars": False,
    "backout": False,
    "gated_mlp": True,
    "hidden_act": "silu",
    "final_logit_softcapping": None,
}
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 17 + 25? <|bos|>"},
    {"role": "assistant", "content": "42"},
    {"role": "user", "content": "Why?"},
]


@pytest.fixture(scope="module")
def qwen2_tokenizer():
    return train_tokenizer(
        topics.values(), 512, max_chars=200_000, doc_cap=10_000, split="qwen2", model_max_length=128
    )


@pytest.fixture(scope="module")
def folder(qwen2_tokenizer, tmp_path_factory):
    ids = {name: getattr(qwen2_tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model = make_model(vocab_size=512, max_position_embeddings=128, **COMPAT, **ids)
    for parameter in model.parameters():
        parameter.data *= 0.5
    path = tmp_path_factory.mktemp("models") / "compat"
    save_model_folder(model, qwen2_tokenizer, path, card=[])
    return path


def test_names_of_parameters():
    assert gguf_name("model.embed_tokens.weight") == "token_embd.weight"
    assert gguf_name("model.norm.weight") == "output_norm.weight"
    assert gguf_name("lm_head.weight") == "output.weight"
    assert gguf_name("model.layers.11.self_attn.k_norm.weight") == "blk.11.attn_k_norm.weight"
    assert gguf_name("model.layers.0.mlp.gate_proj.weight") == "blk.0.ffn_gate.weight"


def test_numbers_in_pairs_of_digits_are_refused(tokenizer, qwen2_tokenizer):
    assert find_pre_tokenizer(qwen2_tokenizer) == "qwen2"
    with pytest.raises(UserError, match=r"no pre-tokenizer that cuts text .* pairs of digits.*--split qwen2"):
        find_pre_tokenizer(tokenizer)


def test_the_package_is_asked_for_by_name(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"needs the gguf package; install it with: pip install -e '.\[export\]'"):
        export_model(folder, tmp_path / "exported", target="gguf", tolerance=1e-5)
    assert not list(tmp_path.iterdir())


def test_the_file_read_back_is_the_model(folder, qwen2_tokenizer, tmp_path):
    gguf = pytest.importorskip("gguf")
    parity = export_model(folder, tmp_path / "exported", target="gguf", tolerance=1e-5)
    assert parity.logits_std > 0.1
    assert parity.max_logit_error <= 1e-5
    assert parity.argmax_agreement == 1.0
    assert {path.name for path in (tmp_path / "exported").iterdir()} == {"model.gguf", "parity.json", "README.md"}
    assert read_json(tmp_path / "exported" / "parity.json")["read_as"] == "Qwen3ForCausalLM"
    fields = gguf.GGUFReader(tmp_path / "exported" / "model.gguf").fields
    found = {name: field.contents() for name, field in fields.items()}
    assert found["general.architecture"] == "qwen3"
    assert found["tokenizer.ggml.pre"] == "qwen2"
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert found["tokenizer.chat_template"] == qwen2_tokenizer.chat_template
    tokens, kinds = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert tokens == qwen2_tokenizer.convert_ids_to_tokens(list(range(512)))
    assert [token for token, kind in zip(tokens, kinds, strict=True) if kind == gguf.TokenType.CONTROL] == [
        *SPECIAL_TOKENS
    ]
    assert found["tokenizer.ggml.eos_token_id"] == qwen2_tokenizer.eos_token_id


def make_texts():
    """Ordinary texts and random ones from characters on which split patterns differ."""
    pool, draw = "aZ 0129'sS\n\r\t.,!?-_éñ東漢ا٣½🙂\u00a0\u200d(){}[]\"\u017f", random.Random(0)
    texts = [
        "don't WE'LL\r\n\r\n  x\n\n\n y\t\tz 1234567",
        "  leading",
        "trail  ",
        "e\u0301 नमस्ते",
        "<|assistant_end|>",
    ]
    return texts + ["".join(draw.choices(pool, k=60)) for _ in range(200)]


def test_llama_cpp_gives_the_same(folder, tmp_path):
    """Log-probabilities of the next token, ids of texts, and the rendered chat."""
    pytest.importorskip("gguf")
    xllamacpp = pytest.importorskip("xllamacpp")
    export_model(folder, tmp_path / "exported", target="gguf", tolerance=1e-5)
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(tmp_path / "exported" / "model.gguf")
    parameters.n_ctx, parameters.n_parallel, parameters.n_gpu_layers = 128, 1, 0
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.warmup, parameters.use_jinja, parameters.verbosity = False, True, 0
    server = xllamacpp.Server(parameters)

    def ask(route, **body):
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(server.listening_address + route, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    model, tokenizer = load_own_model(folder), load_tokenizer(folder)
    ids = torch.randint(0, 512, (1, 100), generator=torch.Generator().manual_seed(2))
    expected = model(ids).logits[0].detach().log_softmax(-1)
    options = {"n_predict": 1, "n_probs": 512, "temperature": 0, "cache_prompt": False}
    for length in (1, 2, 33, 100):
        answer = ask("/completion", prompt=ids[0, :length].tolist(), **options)
        found = torch.zeros(512)
        for entry in answer["completion_probabilities"][0]["top_logprobs"]:
            found[entry["id"]] = entry["logprob"]
        assert (found - expected[length - 1]).abs().max() <= 1e-5
    for text in make_texts():
        found = ask("/tokenize", content=text, add_special=True, parse_special=False)["tokens"]
        assert found == tokenizer(text, split_special_tokens=True)["input_ids"], text
    rendered = tokenizer.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=True)
    assert ask("/apply-template", messages=CONVERSATION)["prompt"] == rendered.removeprefix("<|bos|>")

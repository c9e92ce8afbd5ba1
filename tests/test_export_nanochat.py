"""nanochat's checkpoints become this project's model: against its formulas, written out here, and against its code."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import tiktoken
import torch
from transformers import AutoModelForCausalLM

from chatmodel.export.imports import import_nanochat
from chatmodel.export.nanochat_checkpoint import load_nanochat, load_nanochat_tokenizer
from chatmodel.export.parity import compare_logits, logits_of
from chatmodel.generation import stream_reply
from chatmodel.posttraining import load_stage_model
from chatmodel.runtime import UserError, read_json
from chatmodel.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, build_encoding

SETTINGS = {"sequence_len": 192, "vocab_size": 500, "n_layer": 4, "n_head": 4, "n_kv_head": 2, "n_embd": 64}
PATTERN = "SSSL"
WINDOWS = [128, 128, 128, None]  # keys before the query: a quarter of 192, rounded up to a tile of 128
PADDED = 512
IDS = torch.randint(0, 500, (1, 180), generator=torch.Generator().manual_seed(3))


def make_state(commit: str) -> dict[str, torch.Tensor]:
    """Every parameter of a checkpoint, scalars included, drawn from N(0, 0.02), under nanochat's names."""
    width, layers = SETTINGS["n_embd"], range(SETTINGS["n_layer"])
    key_value = width // SETTINGS["n_head"] * SETTINGS["n_kv_head"]
    rows = PADDED if commit == "92d63d4" else SETTINGS["vocab_size"]
    shapes = {"transformer.wte.weight": (rows, width), "lm_head.weight": (rows, width)}
    for n in layers:
        layer = f"transformer.h.{n}."
        shapes |= {f"{layer}attn.c_q.weight": (width, width), f"{layer}attn.c_proj.weight": (width, width)}
        shapes |= {f"{layer}attn.c_{part}.weight": (key_value, width) for part in "kv"}
        shapes |= {f"{layer}mlp.c_fc.weight": (4 * width, width), f"{layer}mlp.c_proj.weight": (width, 4 * width)}
    if commit == "92d63d4":
        shapes |= {name: (len(layers),) for name in ("resid_lambdas", "x0_lambdas")}
        shapes |= {"smear_gate.weight": (1, 24), "smear_lambda": (1,), "backout_lambda": (1,)}
        for n in (1, 3):
            shapes[f"value_embeds.{n}.weight"] = (rows, key_value)
            shapes[f"transformer.h.{n}.attn.ve_gate.weight"] = (SETTINGS["n_kv_head"], 12)
    draw = torch.Generator().manual_seed(0)
    return {name: 0.02 * torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def norm(x):
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()


def turn(x, base):
    """(T, heads, channels) turned by minus the angle of each position: the halves are real and imaginary parts."""
    half = x.shape[-1] // 2
    angles = torch.arange(len(x))[:, None] / base ** (torch.arange(half, dtype=torch.float64) / half)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.exp(-1j * angles)[:, None]
    return torch.cat([turned.real, turned.imag], -1)


def attend(q, k, v, reach):
    """Causal attention over (T, heads, channels); a query sees `reach` keys before its own."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    distance = torch.arange(len(q))[:, None] - torch.arange(len(q))
    hidden = (distance < 0) | (distance > (len(q) if reach is None else reach))
    scores = torch.einsum("qhc,khc->hqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("hqk,khc->qhc", scores.masked_fill(hidden, -torch.inf).softmax(-1), v).flatten(1)


def forward(state: dict[str, torch.Tensor], commit: str) -> torch.Tensor:
    """nanochat's logits for IDS in fp64. Source: its nanochat/gpt.py, the formulas only."""
    state, ids = {name: value.double() for name, value in state.items()}, IDS[0]
    master, depth, channels = commit == "92d63d4", SETTINGS["n_layer"], SETTINGS["n_embd"] // SETTINGS["n_head"]
    x = norm(state["transformer.wte.weight"][ids])
    if master:
        gate = state["smear_lambda"] * torch.sigmoid(x[1:, :24] @ state["smear_gate.weight"].T)
        x = torch.cat([x[:1], x[1:] + gate * x[:-1]])
    first, middle = x, None
    for n in range(depth):
        part = {name.split(f"h.{n}.")[1]: value for name, value in state.items() if f"h.{n}." in name}
        if master:
            x = state["resid_lambdas"][n] * x + state["x0_lambdas"][n] * first
        inputs = norm(x)
        q, k, v = ((inputs @ part[f"attn.c_{name}.weight"].T).unflatten(1, (-1, channels)) for name in "qkv")
        if master and n % 2 == 1:
            gate = 3 * torch.sigmoid(inputs[:, :12] @ part["attn.ve_gate.weight"].T)
            v = v + gate[..., None] * state[f"value_embeds.{n}.weight"][ids].unflatten(1, (-1, channels))
        q, k = (norm(turn(each, 100_000 if master else 10_000)) * (1.2 if master else 1.0) for each in (q, k))
        x = x + attend(q, k, v, WINDOWS[n] if master else None) @ part["attn.c_proj.weight"].T
        x = x + (norm(x) @ part["mlp.c_fc.weight"].T).relu().square() @ part["mlp.c_proj.weight"].T
        middle = x if n == depth // 2 else middle
    if master:
        x = x - state["backout_lambda"] * middle
    return 15 * torch.tanh(norm(x) @ state["lm_head.weight"][: SETTINGS["vocab_size"]].T / 15)


@pytest.fixture(params=["c75fe54", "92d63d4"])
def commit(request):
    return request.param


def write_checkpoint(folder: Path, commit: str, state=None, **changes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    settings = SETTINGS | ({"window_pattern": PATTERN} if commit == "92d63d4" else {}) | changes
    (folder / "meta_000007.json").write_text(json.dumps({"step": 7, "model_config": settings}))
    torch.save(make_state(commit) if state is None else state, folder / "model_000007.pt")
    return folder / "model_000007.pt"


def swap_layers(state, first=1, second=3):
    """Layers 1 and 3 are alike but for their windows, which stay; so are their value embeddings."""
    names = {}
    for prefix in ("transformer.h.", "value_embeds."):
        for here, there in ((first, second), (second, first)):
            found = [name for name in state if name.startswith(f"{prefix}{here}.")]
            names |= {name: name.replace(f"{prefix}{here}.", f"{prefix}{there}.") for name in found}
    return {name: state[names.get(name, name)] for name in state}


def test_a_checkpoint_has_the_logits_of_nanochats_formulas(commit, tmp_path):
    state = make_state(commit)
    model, found = load_nanochat(write_checkpoint(tmp_path, commit, state))
    expected = forward(state, commit)
    assert found == commit
    assert expected.std() > 0.1
    parity = compare_logits(lambda ids: expected[None], logits_of(model), IDS.tolist())
    assert parity.max_logit_error <= 1e-5
    assert parity.argmax_agreement == 1.0
    swapped, _ = load_nanochat(write_checkpoint(tmp_path, commit, swap_layers(state)))
    assert compare_logits(lambda ids: expected[None], logits_of(swapped), IDS.tolist()).max_logit_error > 1e-3


@pytest.mark.parametrize(
    "name", ["smear_lambda", "smear_gate.weight", "backout_lambda", "x0_lambdas", "resid_lambdas"]
)
def test_every_scalar_counts(name, tmp_path):
    """The comparison above would notice each of them."""
    state = make_state("92d63d4")
    changed = state | {name: state[name] + (1 if "gate" in name else 0.01)}
    assert (forward(state, "92d63d4") - forward(changed, "92d63d4")).abs().max() > 1e-4


def test_saved_by_a_compiled_model_or_in_bf16(tmp_path):
    state = make_state("92d63d4")
    state["transformer.wte.weight"] = state["transformer.wte.weight"].bfloat16()
    saved = {f"_orig_mod.{name}": value for name, value in state.items()}
    model, _ = load_nanochat(write_checkpoint(tmp_path, "92d63d4", saved))
    torch.testing.assert_close(model(IDS).logits[0].double(), forward(state, "92d63d4"), atol=1e-5, rtol=0)


def drop(name):
    return lambda state: {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (drop("smear_lambda"), "lacks model.smear_scale, unlike nanochat at 92d63d4"),
        (lambda state: state | {"extra_lambda": torch.zeros(1)}, "has extra_lambda, unlike nanochat at 92d63d4"),
        (lambda state: state | {"lm_head.weight": torch.zeros(512, 32)}, r"lm_head.weight of shape \(500, 32\)"),
        (lambda state: [state], "holds no parameters"),
    ],
    ids=["another version", "a later version", "other sizes", "no parameters"],
)
def test_parameters_of_another_kind_are_refused(change, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        load_nanochat(write_checkpoint(tmp_path, "92d63d4", change(make_state("92d63d4"))))


def test_missing_and_damaged_files_are_named(tmp_path):
    path = write_checkpoint(tmp_path, "c75fe54")
    with pytest.raises(UserError, match=r"model_000008.pt does not exist"):
        load_nanochat(tmp_path / "model_000008.pt")
    with pytest.raises(UserError, match=r"optim_000007.pt is no nanochat checkpoint"):
        load_nanochat(tmp_path / "optim_000007.pt")
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match="is damaged"):
        load_nanochat(path)
    (tmp_path / "meta_000007.json").write_text('{"model_config": {"n_layer": 4}}')
    with pytest.raises(UserError, match=r"meta_000007.json has no whole model_config"):
        load_nanochat(path)
    (tmp_path / "meta_000007.json").unlink()
    with pytest.raises(UserError, match=r"meta_000007.json does not exist; copy it"):
        load_nanochat(path)


def write_tokenizer(path: Path, *, specials=SPECIAL_TOKENS) -> tiktoken.Encoding:
    """A tokenizer.pkl as nanochat pickles it: bytes, then pairs of letters."""
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [bytes([a, b]) for a in b"etaoinshrdlucmfw" for b in b"etaoinshrdlucmfw"][: 491 - 256]
    special_tokens = {name: 491 + index for index, name in enumerate(specials)}
    ranks = {token: rank for rank, token in enumerate(tokens)}
    encoding = tiktoken.Encoding(
        "rustbpe", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=special_tokens
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(encoding))
    return encoding


class Harm:
    def __reduce__(self):
        return (os.mkdir, ("harm was done",))


def test_only_an_encoding_is_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tokenizer.pkl"
    path.write_bytes(pickle.dumps(Harm()))
    with pytest.raises(UserError, match=r"no tiktoken encoding .*mkdir"):
        load_nanochat_tokenizer(path, model_max_length=64)
    assert not Path("harm was done").exists()
    path.write_bytes(pickle.dumps({"name": "rustbpe"}))
    with pytest.raises(UserError, match="holds a dict"):
        load_nanochat_tokenizer(path, model_max_length=64)
    write_tokenizer(path, specials=SPECIAL_TOKENS[:-1])
    with pytest.raises(UserError, match="other special tokens"):
        load_nanochat_tokenizer(path, model_max_length=64)
    with pytest.raises(UserError, match=r"none.pkl does not exist"):
        load_nanochat_tokenizer(tmp_path / "none.pkl", model_max_length=64)


def test_an_import_is_a_whole_folder(commit, tmp_path):
    """The tokenizer is found where nanochat keeps it; generation uses caches, the chat its template and calculator."""
    path = write_checkpoint(tmp_path / "base_checkpoints" / "d4", commit)
    encoding = write_tokenizer(tmp_path / "tokenizer" / "tokenizer.pkl")
    output = tmp_path / "imported"
    assert import_nanochat(path, output, tokenizer_path=None, nanochat_root=None, tolerance=1e-5) is None
    assert read_json(output / "parity.json")["compared"] is False
    assert "were not compared" in (output / "README.md").read_text()
    model, tokenizer = load_stage_model(output)
    text = "don't 12345 the heat\n\n<|bos|> Größe"
    assert tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True) == encoding.encode_ordinary(
        text
    )
    assert build_encoding(tokenizer).encode_ordinary(text) == encoding.encode_ordinary(text)
    reply = "".join(stream_reply(model, tokenizer, [{"role": "user", "content": "What is 1+2?"}], max_new_tokens=8))
    assert isinstance(reply, str)
    loaded = AutoModelForCausalLM.from_pretrained(output)
    torch.testing.assert_close(loaded(IDS).logits[0].double(), forward(make_state(commit), commit), atol=1e-5, rtol=0)
    assert loaded.config.calculator is not None
    settings = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(loaded.generate(IDS, **settings), loaded.generate(IDS, use_cache=False, **settings))


def test_a_tokenizer_of_another_size_is_refused(tmp_path):
    write_tokenizer(tmp_path / "tokenizer.pkl")
    state = make_state("c75fe54")
    for name in ("transformer.wte.weight", "lm_head.weight"):
        state[name] = state[name][:400]
    path = write_checkpoint(tmp_path / "small", "c75fe54", state, vocab_size=400)
    options = {"tokenizer_path": tmp_path / "tokenizer.pkl", "nanochat_root": None, "tolerance": 1e-5}
    with pytest.raises(UserError, match="has 500 tokens, the model 400"):
        import_nanochat(path, tmp_path / "imported", **options)
    assert not (tmp_path / "imported").exists()
    with pytest.raises(UserError, match="is no checkout of nanochat"):
        import_nanochat(
            write_checkpoint(tmp_path, "c75fe54"), tmp_path / "imported", **options | {"nanochat_root": tmp_path}
        )


# Makes a checkpoint and a tokenizer with nanochat's own code: every parameter is overwritten, as fresh projections
# are zero.
MAKE = """
import json, sys
from dataclasses import asdict
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from pydoc_data.topics import topics
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import RustBPETokenizer
folder = Path(sys.argv[2])
(folder / "base_checkpoints" / "d6").mkdir(parents=True)
tokenizer = RustBPETokenizer.train_from_iterator(list(topics.values()), 1000)
tokenizer.save(str(folder / "tokenizer"))
torch.manual_seed(1)
config = GPTConfig(sequence_len=256, vocab_size=1000, n_layer=6, n_head=4, n_kv_head=2, n_embd=256)
model = GPT(config)
model.init_weights()
for parameter in model.float().parameters():
    torch.nn.init.normal_(parameter, std=0.02)
torch.save(model.state_dict(), folder / "base_checkpoints" / "d6" / "model_000007.pt")
meta = json.dumps({"step": 7, "model_config": asdict(config)})
(folder / "base_checkpoints" / "d6" / "meta_000007.json").write_text(meta)
texts = ["What is 12345? don't\\r\\n\\n x", "Größe 東京 🙂", "def f(x):\\n    return x  \\n"]
(folder / "ids.json").write_text(json.dumps([[text, tokenizer.encode(text)] for text in texts]))
"""


@pytest.mark.data
def test_checkpoints_made_by_nanochats_own_code(nanochat_roots, tmp_path):
    for index, root in enumerate(nanochat_roots):
        made, output = tmp_path / f"made-{index}", tmp_path / f"imported-{index}"
        subprocess.run([sys.executable, "-c", MAKE, str(root), str(made)], check=True, capture_output=True)
        path = made / "base_checkpoints" / "d6" / "model_000007.pt"
        parity = import_nanochat(path, output, tokenizer_path=None, nanochat_root=root, tolerance=1e-5)
        assert parity.logits_std > 0.1
        assert parity.max_logit_error <= 1e-5
        assert parity.argmax_agreement == 1.0
        _, tokenizer = load_stage_model(output)
        for text, ids in read_json(made / "ids.json"):
            assert tokenizer.encode(text, add_special_tokens=False) == ids
        model, _ = load_nanochat(path)
        swapped = path.with_name("model_000008.pt")
        torch.save(swap_layers(torch.load(path, weights_only=True)), swapped)
        swapped.with_name("meta_000008.json").write_text(path.with_name("meta_000007.json").read_text())
        other, _ = load_nanochat(swapped)
        assert compare_logits(logits_of(model), logits_of(other), [list(range(200))]).max_logit_error > 1e-3

"""Whatever a user gets wrong ends in one sentence that names it, and exit code 2, before anything is trained."""

import gzip
import json
import runpy
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from chatmodel.checkpoint import save_model_folder
from chatmodel.runs import Run
from chatmodel.runtime import write_json
from chatmodel.scaling import plan_run
from chatmodel.tokenizer import save_tokenizer

ROOT = Path(__file__).parents[1]
USER, REPLY = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
TINY = {
    "mixed_precision": "no",
    "depth": 1,
    "head_dim": 32,
    "sequence_length": 32,
    "total_batch_tokens": 64,
    "device_batch_size": 2,
}


@pytest.fixture
def run(tmp_path, tokenizer):
    """A run whose tokenizer is finished, and a folder of text beside it."""
    run = Run(tmp_path / "run")
    save_tokenizer(tokenizer, run.folder("tokenizer"))
    run.begin("tokenizer", settings={}).finish({})
    (tmp_path / "text").mkdir()
    for number in range(2):
        texts = {"text": [f"Document {number} {n} is about the number {n}. " * 20 for n in range(20)]}
        pq.write_table(pa.table(texts), tmp_path / "text" / f"shard_{number}.parquet")
    return run


@pytest.fixture
def recipe(run, monkeypatch, capsys):
    """Run a recipe with options; returns the sentence it ends with."""

    def start(name, **options):
        arguments = [f"--{key}={value}" for key, value in options.items()]
        monkeypatch.setattr(sys, "argv", [name, f"--run_dir={run.run_dir}", *arguments])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / "recipes" / name), run_name="__main__")
        assert stop.value.code == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        return lines[0]

    return start


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"dataset": "./nowhere"}, "nowhere"),
        ({"depth": 0}, "depth=0"),
        ({"depth": -2}, "depth=-2"),
        ({"tokens_per_parameter": 0}, "tokens_per_parameter=0"),
        ({"tokens_per_parameter": -1}, "tokens_per_parameter=-1"),
        ({"sequence_length": 100_000, "total_batch_tokens": 200_000, "max_steps": 1}, "longer than the data"),
        ({"device_batch_size": 0}, "device_batch_size=0"),
        ({"total_batch_tokens": 65}, "total_batch_tokens=65"),
        ({"recipe": "best"}, "best"),
        ({"packing": "loose"}, "loose"),
        ({"eval_bundle": "./no.zip"}, "no.zip"),
        ({"eval_every": 0}, "eval_every=0"),
        ({"tracker": "paper"}, "paper"),
        ({"mixed_precision": "fp8"}, "fp8"),
        ({"fp8": "true"}, "fp8 needs "),
        ({"lr_fraction": -1}, "lr_fraction=-1.0"),
        ({"on_bad_shard": "never"}, "on_bad_shard='never'"),
    ],
)
def test_pretraining(recipe, run, tmp_path, options, named):
    assert named in recipe("pretrain.py", **({"dataset": tmp_path / "text", "train_tokens": 256} | TINY | options))
    assert run.folder("data").exists() == ("sequence_length" in options), "only this needs the text to be known"


def test_a_default_that_is_written_out_is_no_change(run, tmp_path, monkeypatch):
    options = {"dataset": tmp_path / "text", "train_tokens": 128, "eval_tokens": 64, "compile": "false"} | TINY

    def start(**changes):
        arguments = [f"--{key}={value}" for key, value in (options | changes).items()]
        monkeypatch.setattr(sys, "argv", ["pretrain.py", f"--run_dir={run.run_dir}", *arguments])
        runpy.run_path(str(ROOT / "recipes" / "pretrain.py"), run_name="__main__")
        return run.read_result("base")

    made = start()
    assert made["metrics"]["passes"] == pytest.approx(128 / made["metrics"]["dataset"]["tokens"])
    assert start(seed=42, eval_every=3)["id"] == made["id"]
    with pytest.raises(SystemExit):
        start(seed=43)


def test_an_empty_folder(recipe, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "empty" in recipe("pretrain.py", dataset=tmp_path / "empty", train_tokens=256, **TINY)


def test_a_corrupt_shard_is_named(recipe, tmp_path):
    shard = tmp_path / "text" / "shard_0.parquet"
    shard.write_bytes(shard.read_bytes()[:-100])
    assert "shard_0.parquet" in recipe("pretrain.py", dataset=tmp_path / "text", train_tokens=256, **TINY)


def test_an_unknown_key_in_the_config(recipe, tmp_path):
    (tmp_path / "a.yaml").write_text("dept: 4\n")
    assert "dept" in recipe("pretrain.py", config=tmp_path / "a.yaml")


def test_a_vocabulary_larger_than_the_text_gives(recipe, run, tmp_path):
    run.result_path("tokenizer").unlink()
    assert "more text" in recipe("train_tokenizer.py", dataset=tmp_path / "text", vocab_size=60_000)


def test_a_stage_whose_input_is_missing(recipe):
    assert "needs stage base" in recipe("sft.py", stage="mid")
    assert "needs stage sft" in recipe("grpo.py")


@pytest.fixture
def base(run, chat_model, tokenizer):
    """A finished base stage with a random model."""
    save_model_folder(chat_model, tokenizer, run.folder("base"), card=[])
    write_json(run.folder("base") / "plan.json", plan_run(4, vocab_size=512).as_dict())
    run.begin("base", settings={}).finish({})
    return run.folder("base")


def test_a_model_folder_without_weights(recipe, base):
    (base / "model.safetensors").unlink()
    assert "holds no weights" in recipe("sft.py", stage="mid")


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        (json.dumps([USER]), "row 2: the conversation has no assistant turn"),
        (json.dumps([REPLY, USER]), "row 2: message 1 is from 'assistant' but should be from 'user'"),
        (json.dumps([USER, REPLY | {"content": " "}]), "row 2: message 2 (from 'assistant') is empty"),
        (json.dumps([USER, REPLY | {"tool_calls": [{"name": "search"}]}]), "row 2: message 2 uses a tool"),
        (
            json.dumps([USER, {"role": "assistant", "content": [{"type": "bash", "text": "ls"}]}]),
            "unknown type 'bash'",
        ),
        (json.dumps({"text": "Once"}), "row 2: the row has no conversation in it (found: text)"),
        ('{"messages": [', "line 2 is not valid JSON"),
    ],
)
def test_a_conversation_that_cannot_be_trained_on(recipe, base, tmp_path, bad, named):
    """Skipped where that is asked for: then all that is left is too long for rows of three tokens."""
    path = tmp_path / "chat.jsonl.gz"
    path.write_bytes(gzip.compress(f"{json.dumps([USER, REPLY])}\n{bad}\n".encode()))
    mixture = f"mixture: [{{name: mine, path: {path}}}]\n"
    (tmp_path / "sft.yaml").write_text(f"{mixture}max_length: 64\n")
    sentence = recipe("sft.py", stage="mid", config=tmp_path / "sft.yaml")
    assert f"{path}, " in sentence
    assert named in sentence
    (tmp_path / "sft.yaml").write_text(f"{mixture}max_length: 3\nskip_invalid: true\n")
    sentence = recipe("sft.py", stage="mid", config=tmp_path / "sft.yaml")
    assert "none of the mixture's 2 conversations can be trained on: mine (1 lost to max_length 3, 1 inv" in sentence


@pytest.mark.parametrize(
    ("mixture", "named"),
    [
        ("[]", "empty"),
        ("[{name: Arithmetic, weight: 0}]", "weight 0"),
        ("[{name: Arithmetic, rows: -1}]", "rows -1"),
        ("[{name: Arithmetic, epochs: .nan}]", "epochs nan"),
        ("[{name: arithmetic}]", "(did you mean Arithmetic?)"),
        ("[{name: SmolTalk, streaming: true}]", "say how many rows"),
        ("[{name: Nothing}]", "Nothing"),
        ("[{name: mine, path: /nowhere.jsonl}]", "/nowhere.jsonl"),
        ("[{name: Arithmetic, row: 3}]", "row"),
    ],
)
def test_a_mixture_that_cannot_be(recipe, base, tmp_path, mixture, named):
    (tmp_path / "sft.yaml").write_text(f"mixture: {mixture}\nmax_length: 64\n")
    assert named in recipe("sft.py", stage="mid", config=tmp_path / "sft.yaml")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ("max_length: 257", "max_length=257 is more than the model's context of 256"),
        ("max_length: 64\nvalidation_mixture: [{name: mine, path: /nowhere.jsonl}]", "/nowhere.jsonl"),
        ("max_length: 64\neval_strategy: steps\neval_steps: 5", "validation_mixture is empty"),
    ],
)
def test_what_fine_tuning_cannot_do(recipe, base, tmp_path, settings, named):
    """Said before the training mixture, which is wrong too, is looked at."""
    (tmp_path / "sft.yaml").write_text(f"mixture: [{{name: mine, path: /absent.jsonl}}]\n{settings}\n")
    assert named in recipe("sft.py", stage="mid", config=tmp_path / "sft.yaml")


def test_learning_rates_of_zero(recipe, base, tmp_path):
    (tmp_path / "sft.yaml").write_text("mixture: [{name: Arithmetic, rows: 4}]\nmax_steps: 1\nlr_fraction: 0\n")
    assert "lr_fraction=0" in recipe("sft.py", stage="mid", config=tmp_path / "sft.yaml")


def test_an_unknown_stage(recipe):
    assert "stage" in recipe("sft.py", stage="best")
    assert "stage" in recipe("eval.py", stage="best")

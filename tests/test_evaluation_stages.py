"""The evaluation of a whole (tiny) run: which metrics a stage gets, and what the recipe writes and refuses."""

import json
import math
import runpy
import sys
from pathlib import Path

import pytest

from chatmodel.checkpoint import save_model_folder
from chatmodel.data.store import build_token_store
from chatmodel.evaluation.decisions import KeptDecisions
from chatmodel.evaluation.stages import EvalArguments, evaluate_stage, find_taught_skills
from chatmodel.runs import Run
from chatmodel.runtime import UserError
from chatmodel.tokenizer import load_tokenizer

TEXT = "Every stage is a recipe, and every number has a command. What is 12 plus 30? It is 42. Spell the word: cat. "
VALIDATION_DOCUMENTS = 10
RECIPE = Path(__file__).parents[1] / "recipes" / "eval.py"


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer, chat_model):
    """A run whose base and sft model are the same random one, with the text of the tokenizer as its data."""
    run = Run(tmp_path_factory.mktemp("runs") / "tiny")
    for name in ("base", "sft"):
        save_model_folder(chat_model, tokenizer, run.folder(name), card=["Random."])
    for split, count in (("train", 30), ("validation", VALIDATION_DOCUMENTS)):
        documents = [f"{split} {n}: {TEXT}" for n in range(count)]
        build_token_store(documents, tokenizer, run.folder("data") / split, dataset={"name": "made up"}, split=split)
    run.begin("base", settings={}, inputs=()).finish({})
    mixture = [{"name": name, "rows": 1} for name in ("Arithmetic", "my own file", "SimpleSpelling")]
    run.begin("sft", settings={}, inputs=("base",)).finish({"mixture": mixture})
    return run


@pytest.fixture
def bundle(tmp_path):
    (tmp_path / "eval_data").mkdir()
    examples = [{"query": f"{n} is", "choices": ["one", "two three"], "gold": n % 2} for n in range(2)]
    entry = {"label": "choose", "dataset_uri": "choose.jsonl", "num_fewshot": [0]}
    entry["icl_task_type"] = "multiple_choice"
    (tmp_path / "core.yaml").write_text(json.dumps({"icl_tasks": [entry]}))
    (tmp_path / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nchoose,25\n")
    (tmp_path / "eval_data" / "choose.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))
    return tmp_path


def measure_documents(run, model):
    """The definition, one document after the other; all of the text is in single-byte characters."""
    bits, n_bytes = 0.0, 0
    for n in range(VALIDATION_DOCUMENTS):
        ids = load_tokenizer(run.folder("base")).encode(f"validation {n}: {TEXT}", return_tensors="pt")
        bits += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1) / math.log(2)
        n_bytes += len(f"validation {n}: {TEXT}")
    return bits / n_bytes


def test_a_base_model_gets_bpb_core_and_samples(run, bundle, tokenizer, chat_model):
    args = EvalArguments(run_dir=run.run_dir, eval_bundle=bundle, eval_tokens=1500, batch_tokens=600)
    metrics = evaluate_stage(args, run, chat_model, tokenizer)
    assert set(metrics) == {"bpb", "core", "samples"}
    assert set(metrics["bpb"]) == {"train", "validation", "validation_documents"}
    assert metrics["bpb"]["validation_documents"] == pytest.approx(measure_documents(run, chat_model), rel=1e-5)
    assert metrics["bpb"]["train"] > 0
    assert metrics["core"]["tasks"]["choose"]["n"] == 2
    assert len(metrics["samples"]) == 7


def test_batches_do_not_change_bits_per_byte(run, tokenizer, chat_model):
    small, large = (
        evaluate_stage(
            EvalArguments(run_dir=run.run_dir, eval_tokens=1500, batch_tokens=tokens), run, chat_model, tokenizer
        )
        for tokens in (1, 3000)
    )
    assert small["bpb"] == pytest.approx(large["bpb"], rel=1e-5)
    assert "not_run" in large["core"]


def test_taught_skills_are_those_of_the_mixtures(run):
    assert find_taught_skills(run, "sft") == ["SimpleSpelling", "Arithmetic"]
    assert find_taught_skills(run, "mid") == []
    assert "SpellingBee" in find_taught_skills(None, "sft")


def start_recipe(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [str(RECIPE), *map(str, arguments)])
    runpy.run_path(str(RECIPE), run_name="__main__")


def test_recipe_evaluates_a_chat_stage_once(monkeypatch, run, tmp_path, caplog):
    caplog.set_level("INFO", logger="chatmodel")
    arguments = ["--run_dir", run.run_dir, "--stage", "sft", "--chatcore", tmp_path, "--max_new_tokens", "4"]
    arguments += ["--num_skill_examples", "2", "--skills", "Arithmetic"]
    start_recipe(monkeypatch, *arguments)
    metrics = run.read_result("sft_eval")["metrics"]
    assert set(metrics["skills"]) == {"Arithmetic"}
    assert metrics["skills"]["Arithmetic"]["n"] == 2
    assert metrics["chatcore"]["chatcore"] is None
    assert all("not_run" in task and task["how"] for task in metrics["chatcore"]["tasks"].values())
    assert metrics["samples"][0]["messages"][0] == {"role": "user", "content": "Who are you?"}
    assert metrics["mixed_precision"] in ("bf16", "no")
    start_recipe(monkeypatch, *arguments)
    assert "nothing to do" in caplog.text


def test_recipe_evaluates_a_model_without_a_run(monkeypatch, run, bundle, tmp_path):
    output = tmp_path / "result.json"
    start_recipe(monkeypatch, "--model", run.folder("base"), "--eval_bundle", bundle, "--output", output)
    result = json.loads(output.read_text())
    assert not output.with_suffix(".decisions").exists()
    assert result["metrics"]["core"]["tasks"]["choose"]["n"] == 2
    assert "not_run" in result["metrics"]["bpb"]
    assert len(result["metrics"]["samples"]) == 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": "rlhf"}, "none of base, mid, sft, rl"),
        ({"run_dir": None}, "either --run_dir"),
        ({"model": "gpt2"}, "either --run_dir"),
        ({"run_dir": None, "model": "gpt2"}, "needs --output"),
        ({"max_per_task": 0}, "max_per_task=0 must be at least 1"),
        ({"eval_bundle": Path("nowhere.zip")}, r"nowhere\.zip does not exist; leave it out, or `curl"),
    ],
)
def test_bad_arguments_get_one_sentence(changes, message):
    with pytest.raises(UserError, match=message):
        EvalArguments(**({"run_dir": Path("runs/x")} | changes))


def test_an_interrupted_recipe_goes_on_where_it_stopped(monkeypatch, run, bundle, tmp_path, caplog):
    """Stopped behind CORE's first task; the second start takes its decisions from the file beside the result."""
    caplog.set_level("INFO")
    output = tmp_path / "result.json"
    arguments = ["--model", run.folder("base"), "--eval_bundle", bundle, "--output", output, "--mixed_precision", "no"]
    keep = KeptDecisions.keep

    def keep_and_stop(self, *values):
        keep(self, *values)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(KeptDecisions, "keep", keep_and_stop)
        with pytest.raises(KeyboardInterrupt):
            start_recipe(patch, *arguments)
    assert not output.exists()
    assert output.with_suffix(".decisions").exists()
    start_recipe(monkeypatch, *arguments)
    assert "tasks are decided already" in caplog.text
    assert output.exists()
    assert not output.with_suffix(".decisions").exists()


def test_an_address_is_taken_as_a_bundle():
    args = EvalArguments(run_dir=Path("runs/x"), eval_bundle="https://example.org/eval_bundle.zip#sha256=12")
    assert args.eval_bundle == "https://example.org/eval_bundle.zip#sha256=12"


def test_recipe_refuses_what_is_not_there(monkeypatch, run, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        start_recipe(monkeypatch, "--run_dir", run.run_dir, "--stage", "rl")
    assert "stage rl_eval needs stage rl" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        start_recipe(monkeypatch, "--model", tmp_path, "--output", tmp_path / "x.json")
    assert f"{tmp_path} holds no model" in capsys.readouterr().err

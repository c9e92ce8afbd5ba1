"""The recipe of mid-training and SFT as a user starts it, on a model that says anything."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file

from chatmodel.checkpoint import save_model_folder
from chatmodel.runs import Run
from chatmodel.runtime import read_json, write_json
from chatmodel.scaling import plan_run

RECIPE = Path(__file__).parents[1] / "recipes" / "sft.py"


@pytest.fixture
def start(tmp_path, tokenizer, monkeypatch):
    """Train a fresh run's SFT with more options; the run."""

    def start(name, *options):
        run = Run(tmp_path / name)
        model = make_model(vocab_size=len(tokenizer), max_position_embeddings=64, bos_token_id=tokenizer.bos_token_id)
        save_model_folder(model, tokenizer, run.folder("mid"), card=["Random."])
        plan = plan_run(4, vocab_size=len(tokenizer), sequence_length=64)
        write_json(run.folder("mid") / "plan.json", plan.as_dict())
        write_json(run.result_path("mid"), {"id": "0123", "metrics": {}})
        plain = [f"--run_dir={run.run_dir}", "--use_cpu", "--mixed_precision=no", "--max_length=64", "--seed=5"]
        plain += ["--max_steps=2", "--report_to=none", "--save_strategy=no"]
        monkeypatch.setattr(sys, "argv", ["sft.py", *plain, *options])
        runpy.run_path(str(RECIPE), run_name="__main__")
        return run

    return start


def test_an_adapter_is_the_same_from_the_same_seed(start):
    """What PEFT draws it draws before the Trainer seeds anything."""
    files = []
    for name in ("a", "b"):
        torch.rand(7)
        run = start(name, "--mixture", "{name: Arithmetic, rows: 20}", "--lora_rank=2")
        files.append(load_file(run.folder("adapters") / "sft" / "adapter_model.safetensors"))
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])


def test_a_mixture_can_stand_on_the_command_line(start, tmp_path, caplog):
    chats = tmp_path / "chats.jsonl"
    chats.write_text('{"instruction": "Say yes.", "output": "Yes."}\n')
    folder = tmp_path / "conversations"
    folder.mkdir()
    with caplog.at_level("WARNING", logger="chatmodel"):
        run = start("c", "--mixture", str(chats), "{name: Arithmetic, rows: 5}", f"--conversations={folder}")
    assert read_json(run.result_path("sft"))["metrics"]["rows"] == 6
    assert "is not used, as no entry of the mixture lists stand_ins" in caplog.text

"""What the one command for all stages asks of each of them, and what it says at the end."""

import argparse
import importlib.util
from pathlib import Path

import pytest

from chatmodel.runs import Run
from chatmodel.runtime import write_json

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def speedrun():
    spec = importlib.util.spec_from_file_location("speedrun", ROOT / "scripts" / "speedrun.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def asked():
    names = ("dataset", "eval_bundle", "chatcore", "conversations", "max_per_task")
    settings = dict.fromkeys(names) | {"run_generated_code": False, "preset": ROOT / "recipes" / "configs" / "h200"}
    return argparse.Namespace(**settings)


def list_commands(speedrun, args, run):
    return {stage[0]: " ".join(speedrun.build_command(stage, args, run)) for stage in speedrun.STAGES}


def test_each_stage_gets_the_data_it_reads(speedrun, asked, tmp_path):
    asked.dataset, asked.chatcore, asked.conversations = "texts", Path("cc"), tmp_path
    commands = list_commands(speedrun, asked, Run(ROOT / "runs" / "h200"))
    assert commands["base"] == (
        "recipes/pretrain.py --config recipes/configs/h200/pretrain.yaml --run_dir runs/h200 --dataset texts"
    )
    assert commands["mid"].endswith(f"--stage mid --chatcore cc --conversations {tmp_path}")
    assert "--conversations" not in commands["rl"]
    assert "--words" not in commands["rl_eval"]  # the folder has no word list
    (tmp_path / "words.txt.gz").touch()
    commands = list_commands(speedrun, asked, Run(ROOT / "runs" / "h200"))
    assert f"--words {tmp_path}/words.txt.gz" in commands["rl_eval"]
    assert [name for name in commands if "--words" in commands[name]] == ["mid_eval", "sft_eval", "rl_eval"]


def test_the_end_shows_an_answer_and_what_to_do_next(speedrun, tmp_path, capsys):
    run = Run(tmp_path)
    unanswered = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": " "}]}
    parts = [
        {"type": "python", "text": "1+1"},
        {"type": "python_output", "text": "2"},
        {"type": "text", "text": "So 2."},
    ]
    answered = {"messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": parts}]}
    write_json(run.result_path("sft_eval"), {"metrics": {"samples": [unanswered, answered]}})
    speedrun.show_outcome(run)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["user: 1+1?", "assistant: ⟨python: 1+1⟩⟨python_output: 2⟩So 2."]
    assert lines[3] == f"The report: {tmp_path}/report.html"
    assert lines[4].endswith(f"scripts/chat_cli.py {tmp_path}/rl")


def test_without_an_answer_the_next_steps_stand_alone(speedrun, tmp_path, capsys):
    speedrun.show_outcome(Run(tmp_path))
    assert "user:" not in capsys.readouterr().out

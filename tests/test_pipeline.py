"""The whole pipeline at its smallest, by the command a user gives: complete, repeatable, resumable."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from chatmodel.runs import STAGE_INPUTS
from chatmodel.runtime import read_json

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


def speedrun(run_dir, *options):
    command = [sys.executable, str(ROOT / "scripts" / "speedrun.py"), "--preset", "smoke", "--run_dir", str(run_dir)]
    return subprocess.run([*command, *options], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "smoke"
    outcome = speedrun(folder)
    assert outcome.returncode == 0, outcome.stdout[-2000:] + outcome.stderr[-4000:]
    return folder


def test_every_stage_has_its_result(run_dir):
    for stage in STAGE_INPUTS:
        result = read_json(run_dir / "results" / f"{stage}.json")
        assert result["metrics"], stage
        assert result["seconds"] > 0
    base = read_json(run_dir / "results" / "base.json")["metrics"]
    assert base["val_bpb_final"] < base["evaluations"][0]["val_bpb"], "pretraining learnt nothing"
    assert read_json(run_dir / "results" / "rl.json")["metrics"]["pass_at_1"]["after"]["n"] == 8


@pytest.mark.parametrize("stage", ["base", "mid", "sft", "rl"])
def test_every_model_folder_is_complete(run_dir, stage):
    names = {path.name for path in (run_dir / stage).iterdir()}
    code = {"configuration_gpt.py", "layers_gpt.py", "modeling_gpt.py", "calculator.py"}
    rest = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert code | rest | {"chat_template.jinja", "README.md", "plan.json"} <= names


def test_the_report_has_every_section(run_dir):
    report = (run_dir / "report.md").read_text()
    for section in (
        "Environment", "Tokenizer training", "Tokenizer evaluation", "Base model training", "Base model loss",
        "Base model evaluation", "Midtraining", "Chat evaluation mid", "Chat SFT", "Chat evaluation sft", "Chat RL",
        "Chat evaluation rl", "Summary",
    ):  # fmt: skip
        assert section.lower() in report.lower(), section
    assert "not run" in report  # no CORE bundle and no ChatCORE data were given
    assert (run_dir / "report.html").read_text().startswith("<!DOCTYPE html>")


def test_a_second_time_nothing_is_done(run_dir):
    before = {path: path.stat().st_mtime for path in (run_dir / "results").glob("*.json")}
    outcome = speedrun(run_dir)
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout.count("finished before") == len(STAGE_INPUTS)
    assert before == {path: path.stat().st_mtime for path in (run_dir / "results").glob("*.json")}


def test_a_finished_stage_can_still_be_looked_at(run_dir):
    config = ROOT / "recipes" / "configs" / "smoke" / "sft.yaml"
    command = [sys.executable, str(ROOT / "recipes" / "sft.py"), "--config", str(config), "--stage", "sft"]
    before = (run_dir / "results" / "sft.json").stat().st_mtime
    outcome = subprocess.run(
        [*command, "--run_dir", str(run_dir), "--preview_masks", "1"], capture_output=True, text=True, check=True
    )
    assert "already finished" in outcome.stderr
    assert "\033[92m" in outcome.stderr, "something is trained on, in green"
    assert (run_dir / "results" / "sft.json").stat().st_mtime == before


def test_a_changed_setting_is_refused(run_dir):
    outcome = speedrun(run_dir, "--max_per_task", "3")
    assert outcome.returncode == 2
    assert "max_per_task=unset, now 3" in outcome.stderr


def test_a_stopped_finetuning_continues_to_the_same_weights(run_dir, tmp_path):
    stopped = tmp_path / "stopped"
    for name in ("base", "tokenizer", "results"):
        shutil.copytree(run_dir / name, stopped / name)
    (stopped / "results" / "mid.json").unlink()
    checkpoint = run_dir / "checkpoints" / "mid" / "checkpoint-2"
    shutil.copytree(checkpoint, stopped / "checkpoints" / "mid" / "checkpoint-2")
    config = ROOT / "recipes" / "configs" / "smoke" / "midtrain.yaml"
    command = [sys.executable, str(ROOT / "recipes" / "sft.py"), "--config", str(config), "--stage", "mid"]
    subprocess.run([*command, "--run_dir", str(stopped)], capture_output=True, check=True)
    assert [entry["step"] for entry in read_json(stopped / "results" / "mid.json")["metrics"]["history"]] == [
        1,
        2,
        3,
        4,
    ]
    expected, found = (load_file(folder / "mid" / "model.safetensors") for folder in (run_dir, stopped))
    assert all((expected[name] == found[name]).all() for name in expected)


def copy_before_pretraining(run_dir, target):
    for name in ("tokenizer", "data"):
        shutil.copytree(run_dir / name, target / name)
    (target / "results").mkdir()
    shutil.copy(run_dir / "results" / "tokenizer.json", target / "results")
    return target


def pretraining_of(run_dir):
    config = ROOT / "recipes" / "configs" / "smoke" / "pretrain.yaml"
    return [str(ROOT / "recipes" / "pretrain.py"), "--config", str(config), "--run_dir", str(run_dir)]


def wait_for_checkpoint(process, run_dir):
    deadline = time.monotonic() + 120
    while not (run_dir / "checkpoints" / "base" / "step-00000004").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_killed_run_continues_to_the_same_weights(run_dir, tmp_path):
    """Killed without warning between two checkpoints: the weights end up bit for bit those of the unbroken run."""
    killed = copy_before_pretraining(run_dir, tmp_path / "killed")
    command = [sys.executable, *pretraining_of(killed)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    wait_for_checkpoint(process, killed)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / "results" / "base.json").exists()
    outcome = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "continuing from" in outcome.stderr
    expected, found = (load_file(folder / "base" / "model.safetensors") for folder in (run_dir, killed))
    assert all((expected[name] == found[name]).all() for name in expected)


def test_what_accelerate_launched_saves_and_stops_with_it(run_dir, tmp_path):
    """`accelerate launch` dies of SIGTERM, and tells its child nothing."""
    stopped = copy_before_pretraining(run_dir, tmp_path / "stopped")
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(ROOT / "accelerate_config.yaml"),
    ]
    command += [*pretraining_of(stopped), "--max_steps", "100000", "--eval_every", "100000"]
    launcher = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_for_checkpoint(launcher, stopped)
    (recipe,) = psutil.Process(launcher.pid).children()
    try:
        launcher.terminate()
        said = launcher.communicate(timeout=60)[1]  # it ends when the last of both has closed it
    finally:
        with suppress(psutil.NoSuchProcess):
            recipe.kill()
    assert "as the program that launched it has ended" in said
    assert "stopped by SIGTERM after step" in said
    assert not (stopped / "results" / "base.json").exists()

"""Several seeds of RL from one SFT model, put together."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from chatmodel.evaluation.statistics import pack_decisions
from chatmodel.problems import summarize_samples
from chatmodel.runs import Run
from chatmodel.runtime import UserError, read_json, write_json

SCRIPT = Path(__file__).parents[1] / "scripts" / "repeat_rl.py"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("repeat_rl", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def source(tmp_path):
    run = Run(tmp_path / "cpu")
    run.folder("sft").mkdir(parents=True)
    (run.folder("sft") / "config.json").write_text("{}")
    write_json(run.result_path("sft"), {"id": "7"})
    return run


def measured(right, counts):
    return {"n": len(right), "correct": sum(right), "decisions": pack_decisions(right)}, summarize_samples(
        counts, 2, [1]
    )


def make_recipe(after):
    """A stand-in for the recipe that solves what `after` says for its seed."""

    def run(command, stdout, stderr, env, check):
        options = dict(zip(command[2::2], command[3::2], strict=True))
        seed = options["--seed"]
        (first, first_samples), (last, last_samples) = measured([0, 1, 0, 1], [0, 2, 0, 2]), measured(*after[seed])
        metrics = {
            "task": "Arithmetic",
            "train_seconds": 3.0,
            "change": {},
            "pass_at_1": {"before": first, "after": last},
            "sampled": {"before": first_samples, "after": last_samples},
        }
        write_json(Run(Path(options["--run_dir"])).result_path("rl"), {"metrics": metrics, "options": options})
        return SimpleNamespace(returncode=0)

    return run


def test_seeds_run_apart_and_are_put_together(script, source, monkeypatch, capsys):
    after = {"1": ([1, 1, 0, 1], [2, 2, 0, 2]), "2": ([1, 1, 1, 1], [1, 2, 1, 2])}
    monkeypatch.setattr(script.subprocess, "run", make_recipe(after))
    arguments = ["repeat_rl.py", str(source.run_dir), "--config", "c.yaml", "--seeds", "1", "2", "--max_steps", "5"]
    monkeypatch.setattr(sys, "argv", arguments)
    script.main()
    printed = capsys.readouterr().out
    assert "seed 1: greedy 2 -> 3, 3 s" in printed
    assert "greedy: +0.3750 ± 0.2394 (paired over problems), ± 0.1250 over 2 seeds" in printed
    assert "pass@1: +0.2500" in printed
    found = read_json(source.run_dir / "rl_seeds.json")
    assert found["change"]["greedy"]["num_seeds"] == 2
    other = Run(source.run_dir.with_name("cpu-rl-2"))
    assert (other.folder("sft") / "config.json").exists()
    assert read_json(other.result_path("rl"))["options"]["--max_steps"] == "5"


def test_a_failure_is_said_with_its_last_line(script, source, monkeypatch):
    def fail(command, stdout, stderr, env, check):
        stdout.write("a\nerror: no such thing\n")
        stdout.flush()
        return SimpleNamespace(returncode=2)

    monkeypatch.setattr(script.subprocess, "run", fail)
    monkeypatch.setattr(sys, "argv", ["repeat_rl.py", str(source.run_dir), "--config", "c.yaml"])
    with pytest.raises(UserError, match=r"seed 1 failed, see .*rl.log: error: no such thing"):
        script.main()


def test_sft_comes_first(script, tmp_path):
    with pytest.raises(UserError, match="has no finished SFT"):
        script.prepare_run(Run(tmp_path / "new"), 1)

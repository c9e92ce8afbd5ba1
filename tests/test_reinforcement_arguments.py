"""What a user of RL gets wrong ends in one sentence; a killed run ends with the weights of an unbroken one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import make_model
from safetensors.torch import load_file
from test_reinforcement import grpo
from trl import GRPOConfig

from chatmodel.checkpoint import save_model_folder
from chatmodel.runs import Run
from chatmodel.runtime import UserError, read_json, write_json
from chatmodel.scaling import plan_run
from chatmodel.tokenizer import calculator_table

ROOT = Path(__file__).parents[1]
SMALL = {
    "use_cpu": True,
    "task": "Arithmetic",
    "rows": 16,
    "pass_examples": 6,
    "pass_samples": 2,
    "pass_k": 2,
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "max_completion_length": 12,
    "mixed_precision": "no",
    "report_to": "none",
}


@pytest.fixture
def run(tmp_path, tokenizer):
    """A run whose SFT is finished: a model that says anything."""
    run = Run(tmp_path / "run")
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 64, "bos_token_id": tokenizer.bos_token_id}
    model = make_model(calculator=calculator_table(tokenizer), **sizes, **ends)
    save_model_folder(model, tokenizer, run.folder("sft"), card=["Random."])
    plan = plan_run(4, vocab_size=len(tokenizer), sequence_length=64)
    write_json(run.folder("sft") / "plan.json", plan.as_dict())
    write_json(run.result_path("sft"), {"id": "0123", "metrics": {}})
    return run


def command(run, **changes):
    settings = SMALL | changes
    return [f"--run_dir={run.run_dir}", *(f"--{key}={value}" for key, value in settings.items())]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"task": "GSM9K"}, r"task='GSM9K' is not known \(did you mean GSM8K\?\); choose one of GSM8K, Arithmetic"),
        ({"task": "Identity"}, "task='Identity' has no '#### answer' to reward"),
        ({"num_generations": 3}, r"generation_batch_size \(8\) must be divisible by num_generations \(3\)"),
        ({"mode": "best"}, "mode='best' must be one of default, nanochat"),
        ({"mode": "nanochat", "beta": 0.1}, "mode=nanochat stands for beta=0.0, but beta=0.1 was asked for"),
        ({"pass_k": 3}, r"pass_k=\[3\] must lie between 1 and pass_samples=2"),
        ({"pass_examples": 0}, "pass_examples=0 must be greater than 0"),
        ({"lr_fraction": 0}, "lr_fraction=0.0 must be greater than 0"),
        ({"temperature": 0}, "temperature=0.0 must be finite and greater than 0"),
        ({"temperature": "inf"}, "temperature=inf must be finite"),
        ({"num_generations": 0}, "num_generations=0 must be at least 2"),
        ({"eval_strategy": "steps", "eval_steps": 1}, "eval_strategy is not for this stage"),
        ({"reward_weights": "nan"}, r"reward_weights=\[nan\] must be 1 finite numbers, one for each of \['task'\]"),
        ({"rewards": "length"}, "reward 'length' is not known; choose task, form, or a function as my.py:function"),
        ({"rewards": "form", "mode": "nanochat"}, r"mode=nanochat stands for rewards=\['task'\]"),
        ({"rows": 0}, "rows=0 must be at least 1; leave it out for all of the task"),
        ({"top_k": -1}, "top_k=-1 must be 0, which draws from all tokens, or more"),
        ({"top_p": 0}, "top_p=0.0 must be greater than 0 and at most 1"),
        ({"max_completion_length": 0}, "max_completion_length=0 must be at least 1"),
        ({"max_steps": 0}, "max_steps=0 would train nothing"),
        ({"learning_rate": 0.1}, "learning_rate is not read"),
        ({"loss_type": "best"}, "loss_type='best' must be one of grpo, bnpo, dr_grpo, dapo"),
        ({"beta": -1}, "beta=-1.0 must be 0 or more"),
        ({"num_iterations": 0}, "num_iterations=0 must be at least 1"),
        ({"max_completion_length": 60}, "max_completion_length=60 does not fit the model's context of 64 behind the"),
    ],
)
def test_one_sentence_each(run, monkeypatch, changes, sentence):
    monkeypatch.setattr(sys, "argv", ["grpo.py", *command(run, **changes)])
    with pytest.raises(UserError, match=sentence):
        grpo.main()
    assert not run.folder("rl").exists()


def test_a_task_and_a_mixture_are_too_much():
    arguments = grpo.RewardArguments(task="GSM8K", mixture=["Arithmetic"])
    with pytest.raises(UserError, match="mixture and task"):
        arguments.check(None, {})
    assert grpo.RewardArguments().tasks() == [{"name": "GSM8K"}]
    assert grpo.RewardArguments(mixture=["Arithmetic"]).tasks() == ["Arithmetic"]


@pytest.mark.parametrize(
    ("mode", "settings", "warned"),
    [
        ("default", {}, False),
        ("default", {"top_k": 50}, True),
        ("default", {"top_p": 0.9}, True),
        ("nanochat", {"top_k": 50}, False),
    ],
)
def test_drawing_from_fewer_tokens_than_are_trained_is_said(tmp_path, caplog, mode, settings, warned):
    """Not of nanochat's mode, which stands for what nanochat does."""
    training = GRPOConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False, **settings)
    grpo.RewardArguments(mode=mode).check(training, {})
    assert ("What flows to the others is never drawn" in caplog.text) == warned


@pytest.mark.long
def test_a_killed_run_ends_with_the_same_weights(run, tmp_path):
    """By the recipe, killed without warning between two checkpoints; its result holds the whole history."""
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1, "top_k": 20}
    start = [sys.executable, str(ROOT / "recipes" / "grpo.py"), *command(run, **settings)]
    subprocess.run(start, capture_output=True, check=True)
    expected, result = load_file(run.folder("rl") / "model.safetensors"), read_json(run.result_path("rl"))
    for name in ("rl", "checkpoints"):
        run.folder(name).rename(tmp_path / name)
    run.result_path("rl").unlink()
    process = subprocess.Popen(start, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (run.checkpoints("rl") / "checkpoint-2" / "trainer_state.json").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    subprocess.run(start, capture_output=True, check=True)
    found = load_file(run.folder("rl") / "model.safetensors")
    assert all((expected[name] == found[name]).all() for name in expected)
    again = read_json(run.result_path("rl"))
    assert again["metrics"]["pass_at_1"] == result["metrics"]["pass_at_1"]
    assert again["metrics"]["completions_sampled"] == result["metrics"]["completions_sampled"]
    rewards = [[entry["reward"] for entry in each["metrics"]["history"]] for each in (again, result)]
    assert rewards[0] == rewards[1]
    assert len(rewards[0]) == 6

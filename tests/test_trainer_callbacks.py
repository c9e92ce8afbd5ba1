"""The guard on gradients, and what a Trainer adds up over all its starts."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model
from tiny_finetuning import build_trainer

from chatmodel.runtime import UserError
from chatmodel.trainer_callbacks import StepLines, StopOnBadGradient, TrainingTotals, sum_up


def test_a_gradient_that_is_not_finite_stops_the_run():
    model = make_model()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    where = {"args": SimpleNamespace(output_dir="run"), "state": SimpleNamespace(global_step=4), "control": None}
    StopOnBadGradient().on_pre_optimizer_step(**where, model=model)
    model.lm_head.weight.grad[3, 5] = float("nan")
    with pytest.raises(UserError, match="step 5"):
        StopOnBadGradient().on_pre_optimizer_step(**where, model=model)


SETTINGS = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "logging_steps": 2}


def train(folder, tokenizer, *, after=None):
    folder.mkdir(exist_ok=True)
    trainer = build_trainer(folder, tokenizer, **SETTINGS)
    outcome = trainer.train(resume_from_checkpoint=after and str(folder / "checkpoints" / f"checkpoint-{after}"))
    return trainer, outcome


def test_steps_are_told_in_lines(tmp_path, tokenizer, caplog, capfd):
    caplog.set_level("INFO", logger="chatmodel")
    trainer, _ = train(tmp_path / "run", tokenizer)
    lines = [record.message for record in caplog.records if record.message.startswith("step")]
    assert [line.split(" | ")[0] for line in lines] == ["step 2/6", "step 4/6", "step 6/6"]
    first = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert f"loss {first['loss']:.4f} | gradient {first['grad_norm']:.3g} | lr x0.83" in lines[0]
    assert all(" tok/s | " in line and line.endswith(" min left") for line in lines)
    assert lines[-1].endswith("| 0.0 min left")
    written = "".join(capfd.readouterr())
    assert "/6 [" not in written  # neither a bar
    assert "{'loss'" not in written  # nor a dict


def test_what_is_told_of_other_stages(caplog):
    caplog.set_level("INFO", logger="chatmodel")
    lines, state = StepLines(), SimpleNamespace(is_world_process_zero=True, global_step=3, max_steps=9)
    lines.on_train_begin(None, state, None)
    optimizer = SimpleNamespace(param_groups=[{"initial_lr": 0.2}])
    logs = {"loss": 1e-9, "reward": 0.25, "completions/mean_length": 12.4, "entropy": 1.5, "learning_rate": 0.1}
    lines.on_log(None, state, None, logs=logs | {"rollout_tokens_per_second": 1234.5}, optimizer=optimizer)
    lines.on_log(None, state, None, logs={"eval_loss": 2.0}, optimizer=optimizer)
    lines.on_log(None, state, None, logs={"train_runtime": 2.0}, optimizer=optimizer)
    assert [record.message for record in caplog.records] == [
        "step 3/9 | reward 0.250 | 12 tokens each | entropy 1.50 | lr x0.50 | 1,234 sampled tok/s",
        "step 3 | validation loss 2.0000",
    ]


def test_totals_are_those_of_all_starts(tmp_path, tokenizer):
    unbroken, outcome = train(tmp_path / "run", tokenizer)
    whole = sum_up(unbroken, outcome)
    assert whole["train_loss"] == pytest.approx(outcome.training_loss)
    assert whole["train_seconds"] == outcome.metrics["train_runtime"]

    state_file = tmp_path / "run" / "checkpoints" / "checkpoint-4" / "trainer_state.json"
    state = json.loads(state_file.read_text())
    kept = state["stateful_callbacks"]["TrainingTotals"]["attributes"]
    assert 0 < kept["seconds"] < whole["train_seconds"]
    kept["seconds"] = 100.0
    state_file.write_text(json.dumps(state))
    continued, outcome = train(tmp_path / "run", tokenizer, after=4)
    found = sum_up(continued, outcome)
    assert found["train_loss"] == pytest.approx(whole["train_loss"])
    assert outcome.training_loss != pytest.approx(whole["train_loss"])  # of the last two steps
    assert 100 < found["train_seconds"] == 100 + outcome.metrics["train_runtime"]
    last = json.loads((tmp_path / "run" / "checkpoints" / "checkpoint-6" / "trainer_state.json").read_text())
    assert last["stateful_callbacks"]["TrainingTotals"]["attributes"]["seconds"] > 100


def test_a_checkpoint_without_totals_is_continued(tmp_path, tokenizer):
    """As those of before there were any."""
    train(tmp_path / "run", tokenizer)
    state_file = tmp_path / "run" / "checkpoints" / "checkpoint-4" / "trainer_state.json"
    state = json.loads(state_file.read_text())
    del state["stateful_callbacks"]["TrainingTotals"]
    state_file.write_text(json.dumps(state))
    continued, outcome = train(tmp_path / "run", tokenizer, after=4)
    assert sum_up(continued, outcome)["train_seconds"] == outcome.metrics["train_runtime"]


def test_nothing_was_left_to_train(tmp_path, tokenizer):
    """Stopped behind the last step, before the model was handed on."""
    unbroken, outcome = train(tmp_path / "run", tokenizer)
    whole = sum_up(unbroken, outcome)
    continued, outcome = train(tmp_path / "run", tokenizer, after=6)
    assert (continued.state.global_step, outcome.training_loss) == (6, 0)
    assert sum_up(continued, outcome)["train_loss"] == pytest.approx(whole["train_loss"])
    after = dict(continued.model.named_parameters())
    assert all(torch.equal(weight, after[name]) for name, weight in unbroken.model.named_parameters())


def test_seconds_before_training_are_none():
    assert TrainingTotals().state()["attributes"]["seconds"] == 0

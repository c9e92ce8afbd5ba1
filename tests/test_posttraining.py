"""What mid-training, SFT and RL share: batches, histories, checkpoints of a Trainer, and the guard on gradients."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model
from datasets import Dataset

from chatmodel.posttraining import (
    SealCheckpoints,
    StopOnBadGradient,
    batch_rows,
    build_stage_optimizer,
    latest_trainer_checkpoint,
    pick_history,
)
from chatmodel.runtime import UserError, write_json
from chatmodel.scaling import plan_run


def test_batches_shift_labels_and_pad():
    rows = Dataset.from_dict({"input_ids": [[1, 2, 3, 4], [5, 6]], "labels": [[-100, -100, 3, 4], [-100, 6]]})
    (batch,) = batch_rows(rows, pad_token_id=0, batch_size=2)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [5, 0, 0]]
    assert batch["shift_labels"].tolist() == [[-100, 3, 4], [6, -100, -100]]


def test_history_keeps_steps_and_asked_keys():
    log = [{"step": 1, "loss": 2.0, "completions/mean_length": 7.0}, {"step": 2, "eval_loss": 3.0}, {"step": 3}]
    assert pick_history(log, "loss", "completions/mean_length") == [{"step": 1, "loss": 2.0, "mean_length": 7.0}]
    assert pick_history(log, "eval_loss") == [{"step": 2, "eval_loss": 3.0}]


def test_a_half_written_checkpoint_is_not_continued_from(tmp_path):
    for step, files in ((5, ("trainer_state.json", "optimizer.pt")), (10, ("optimizer.pt",))):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in files:
            (folder / name).write_text(json.dumps({}))
    assert latest_trainer_checkpoint(tmp_path) == str(tmp_path / "checkpoint-5")
    assert not (tmp_path / "checkpoint-10").exists()
    assert latest_trainer_checkpoint(tmp_path / "nowhere") is None


def test_a_damaged_checkpoint_is_passed_over_and_kept(tmp_path, caplog):
    for step in (5, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in ("trainer_state.json", "optimizer.pt", "model.safetensors"):
            (folder / name).write_text(json.dumps({"step": step}))
        where = {"args": SimpleNamespace(output_dir=str(tmp_path)), "control": None}
        SealCheckpoints().on_save(state=SimpleNamespace(global_step=step, is_world_process_zero=True), **where)
    assert latest_trainer_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    content = bytearray((tmp_path / "checkpoint-10" / "model.safetensors").read_bytes())
    content[3] ^= 1
    (tmp_path / "checkpoint-10" / "model.safetensors").write_bytes(content)
    with caplog.at_level("WARNING", logger="chatmodel"):
        assert latest_trainer_checkpoint(tmp_path) == str(tmp_path / "checkpoint-5")
    assert "checkpoint-10 is damaged (model.safetensors has changed)" in caplog.text
    assert (tmp_path / "damaged-checkpoint-10").exists()


def test_rates_are_pretrainings_times_the_fraction(tmp_path):
    plan = plan_run(4, vocab_size=97, sequence_length=64)
    write_json(tmp_path / "plan.json", plan.as_dict())
    optimizer = build_stage_optimizer(make_model(), tmp_path, lr_fraction=0.1)
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert groups["head"]["lr"] == pytest.approx(0.1 * plan.groups["head"].lr)
    assert groups["matrix"]["weight_decay"] == 0.0
    with pytest.raises(UserError, match="lr_fraction=0"):
        build_stage_optimizer(make_model(), tmp_path, lr_fraction=0)


def test_a_gradient_that_is_not_finite_stops_the_run():
    model = make_model()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    where = {"args": SimpleNamespace(output_dir="run"), "state": SimpleNamespace(global_step=4), "control": None}
    StopOnBadGradient().on_pre_optimizer_step(**where, model=model)
    model.lm_head.weight.grad[3, 5] = float("nan")
    with pytest.raises(UserError, match="step 5"):
        StopOnBadGradient().on_pre_optimizer_step(**where, model=model)

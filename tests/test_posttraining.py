"""What mid-training, SFT and RL share: histories, and checkpoints of a Trainer."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model

from chatmodel.posttraining import (
    build_stage_optimizer,
    explain_memory,
    latest_trainer_checkpoint,
    pick_history,
    use_device,
)
from chatmodel.runtime import UserError, write_json
from chatmodel.scaling import plan_run
from chatmodel.trainer_callbacks import SealCheckpoints


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


def test_one_of_several_gpus_is_taken(caplog):
    """A Trainer that finds several would wrap the model in DataParallel, which TRL refuses."""
    training = SimpleNamespace(device=torch.device("cuda", 0), n_gpu=2, _n_gpu=2)
    with caplog.at_level("WARNING", logger="chatmodel"):
        use_device(training)
    assert training.dataloader_pin_memory
    assert training._n_gpu == 1
    assert "one of the 2 GPUs" in caplog.text


def test_a_full_memory_is_one_sentence():
    training = SimpleNamespace(device="cuda:0", per_device_train_batch_size=32, gradient_accumulation_steps=2)
    with pytest.raises(UserError) as caught, explain_memory(training):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB. GPU 0 has")
    sentence = str(caught.value)
    assert "per_device_train_batch_size=32 (CUDA out of memory)" in sentence
    assert "gradient_accumulation_steps higher than 2" in sentence
    rollouts = explain_memory(training, other="rollout_batch_size=512")
    with pytest.raises(UserError, match="or, if that was not it, lower rollout_batch_size=512"), rollouts:
        raise torch.OutOfMemoryError("CUDA out of memory. GPU 0 has")

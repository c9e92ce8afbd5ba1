"""The same seed gives the same weights, and a run killed without warning ends at those of one that was not."""

import os
import signal
import sys

import pytest
import torch
from tiny_finetuning import build_trainer, make_conversations
from tiny_pretraining import fork, wait
from transformers import TrainerCallback

from chatmodel.finetuning.evaluation import ValidationLoss
from chatmodel.finetuning.rows import ConversationRows
from chatmodel.posttraining import latest_trainer_checkpoint

SETTINGS = {"max_steps": 7, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}


@pytest.fixture(autouse=True)
def one_thread():
    """A forked process has none of PyTorch's other threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class KillAt(TrainerCallback):
    """Ends this process between two micro-batches of a step, as the system does when it has no memory left."""

    def __init__(self, step):
        self.step = step

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train(folder, tokenizer, dtype, *, kill_at=None, **options):
    folder.mkdir(exist_ok=True)
    trainer = build_trainer(folder, tokenizer, dtype=dtype, **(SETTINGS | options))
    if kill_at is not None:
        trainer.add_callback(KillAt(kill_at))
    found = latest_trainer_checkpoint(folder / "checkpoints")
    trainer.train(resume_from_checkpoint=found)
    trainer.finish()
    return trainer, found


def weights(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[name]), name


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_killed_and_repeated(tmp_path, tokenizer, dtype):
    unbroken, _ = train(tmp_path / "unbroken", tokenizer, dtype)
    again, _ = train(tmp_path / "again", tokenizer, dtype, save_strategy="no")
    assert_equal(weights(unbroken), weights(again))

    child = fork(train, tmp_path / "killed", tokenizer, dtype, kill_at=5, log=tmp_path / "killed.log")
    assert wait(child) == [-signal.SIGKILL]
    continued, found = train(tmp_path / "killed", tokenizer, dtype)
    assert found.endswith("checkpoint-4")
    assert_equal(weights(unbroken), weights(continued))
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (unbroken, continued)]
    assert losses[0] == losses[1]
    other, _ = train(tmp_path / "other", tokenizer, dtype, seed=1, save_strategy="no")
    assert not torch.equal(other.model.lm_head.weight, unbroken.model.lm_head.weight)


@pytest.mark.slow
def test_evaluations_change_nothing_and_are_kept(tmp_path, tokenizer, monkeypatch):
    """Also what was measured and said before a checkpoint is there after it."""
    monkeypatch.setattr("chatmodel.finetuning.trainer.answer_samples", lambda *_: [{"messages": ["said"]}])
    rows = ConversationRows(make_conversations(20, seed=9), length=24, batch_size=3, pad_token_id=0)
    unbroken, _ = train(tmp_path / "unbroken", tokenizer, torch.float32)
    options = {"eval_strategy": "steps", "eval_steps": 2, "validation": ValidationLoss(rows, tokenizer)}
    train(tmp_path / "stopped", tokenizer, torch.float32, **options)
    for step in (6, 7):  # as if stopped behind step 4
        folder = tmp_path / "stopped" / "checkpoints" / f"checkpoint-{step}"
        if folder.exists():
            folder.rename(tmp_path / folder.name)
    continued, found = train(tmp_path / "stopped", tokenizer, torch.float32, **options)
    assert found.endswith("checkpoint-4")
    assert_equal(weights(unbroken), weights(continued))
    log = continued.state.log_history
    assert [entry["step"] for entry in log if "eval_loss" in entry] == [2, 4, 6, 7]
    assert [entry["step"] for entry in log if "samples" in entry] == [2, 4, 6, 7]

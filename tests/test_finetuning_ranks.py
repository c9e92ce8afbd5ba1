"""Two processes train as one does: gradients are summed, and a step's tokens counted over both."""

import pytest
import torch
from tiny_finetuning import build_trainer, make_conversations
from tiny_pretraining import fork_ranks, wait

from chatmodel.finetuning.evaluation import ValidationLoss
from chatmodel.finetuning.rows import ConversationRows

pytestmark = pytest.mark.slow


def train_and_save(folder, tokenizer, accumulation, loss_scale):
    folder.mkdir(exist_ok=True)
    rows = ConversationRows(make_conversations(30, seed=9), length=24, batch_size=2, pad_token_id=0)
    trainer = build_trainer(
        folder,
        tokenizer,
        conversations=make_conversations(90),  # an epoch holds all steps
        loss_scale=loss_scale,
        max_steps=3,
        gradient_accumulation_steps=accumulation,
        train_sampling_strategy="sequential",
        validation=ValidationLoss(rows, tokenizer),
    )
    trainer.train()
    trainer.finish()
    if trainer.is_world_process_zero():
        losses = [[entry["loss"], entry["grad_norm"]] for entry in trainer.state.log_history if "loss" in entry]
        measured = trainer.state.log_history[-1]["eval_loss"]
        torch.save(
            (trainer.model.state_dict(), losses, measured, trainer.accelerator.num_processes), folder / "end.pt"
        )


@pytest.mark.parametrize("loss_scale", ["tokens", "nanochat"])
def test_two_ranks_end_where_one_does(tmp_path, tokenizer, monkeypatch, loss_scale):
    monkeypatch.setattr("chatmodel.finetuning.trainer.answer_samples", lambda *_: [])
    train_and_save(tmp_path / "one", tokenizer, 4, loss_scale)
    ranks = fork_ranks(2, train_and_save, tmp_path / "two", tokenizer, 2, loss_scale, log=tmp_path / "log")
    assert wait(*ranks) == [0, 0], (tmp_path / "log.0").read_text()[-3000:]
    (one, losses, measured, _), (two, other_losses, other, processes) = (
        torch.load(tmp_path / name / "end.pt") for name in ("one", "two")
    )
    assert processes == 2
    assert torch.tensor(other_losses) == pytest.approx(torch.tensor(losses), rel=1e-5)
    assert other == pytest.approx(measured, rel=1e-5)
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, atol=1e-5, rtol=0, msg=name)

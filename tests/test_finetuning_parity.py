"""The loops of karpathy/nanochat@c75fe54 scripts/chat_sft.py and mid_train.py, written out by their formulas."""

import pytest
import torch
from conftest import make_model
from tiny_finetuning import LENGTH, build_trainer, make_conversations

from chatmodel.finetuning.rows import StreamRows
from chatmodel.finetuning.schedule import MomentumWarmup
from chatmodel.posttraining import build_stage_optimizer

STEPS, MICRO_BATCHES, ROWS = 10, 2, 3
END = 5  # any id will do for padding


def pad_rows(rows):
    """Inputs without each last id and the targets that follow them; padding has no target."""
    width = max(len(row["input_ids"]) for row in rows) - 1
    inputs, targets = torch.full((len(rows), width), END), torch.full((len(rows), width), -1)
    for line, row in enumerate(rows):
        ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
        inputs[line, : len(ids) - 1] = ids[:-1]
        targets[line, : len(ids) - 1] = torch.where(labels[1:] == -100, -1, ids[1:])
    return inputs, targets


def run_loop(model, optimizer, conversations):
    """The mean of micro-batches' means, in order, at rates that fall linearly from the first step; nothing clipped."""
    model.train()
    initial = [group["lr"] for group in optimizer.param_groups]
    place = 0
    for step in range(STEPS):
        for _ in range(MICRO_BATCHES):
            rows = [conversations[(place + n) % len(conversations)] for n in range(ROWS)]
            place += ROWS
            inputs, targets = pad_rows(rows)
            logits = model(input_ids=inputs, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
            (loss / MICRO_BATCHES).backward()
        for group, rate in zip(optimizer.param_groups, initial, strict=True):
            group["lr"] = rate * (1.0 - step / STEPS)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model


def run_trainer(folder, tokenizer, model, *, loss_scale, optimizer=None):
    trainer = build_trainer(
        folder,
        tokenizer,
        model=model,
        conversations=make_conversations(STEPS * MICRO_BATCHES * ROWS),
        packed=False,
        loss_scale=loss_scale,
        optimizers=(optimizer, None),
        max_steps=STEPS,
        per_device_train_batch_size=ROWS,
        gradient_accumulation_steps=MICRO_BATCHES,
        train_sampling_strategy="sequential",
    )
    trainer.train()
    trainer.finish()
    return trainer.model


def greatest_difference(model, other):
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return max(float((mine - theirs).detach().abs().max()) for mine, theirs in pairs)


def make_tiny(**options):
    return make_model(max_position_embeddings=LENGTH, **options)


@pytest.mark.parametrize("kind", ["ours", "torch.optim.AdamW"])
def test_ten_steps_end_at_the_loops_weights(tmp_path, tokenizer, kind):
    def build_optimizer(model):
        if kind == "ours":
            return build_stage_optimizer(model, tmp_path, lr_fraction=0.1)
        # With 1e-10 a gradient that is 0 but for its rounding would move its weight by a whole rate.
        return torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.8, 0.95), eps=1e-8, weight_decay=0.0)

    model = make_tiny()
    ours = run_trainer(
        tmp_path,
        tokenizer,
        model,
        loss_scale="nanochat",
        optimizer=None if kind == "ours" else build_optimizer(model),
    )
    theirs = make_tiny()
    run_loop(theirs, build_optimizer(theirs), make_conversations(STEPS * MICRO_BATCHES * ROWS))
    assert greatest_difference(ours, make_tiny()) > 4e-4, "nothing was trained"
    assert greatest_difference(ours, theirs) < 1e-5


def test_counting_every_token_the_same_is_something_else(tmp_path, tokenizer):
    """Which is the default, since its result does not depend on the size of micro-batches."""
    ours = run_trainer(tmp_path, tokenizer, make_tiny(), loss_scale="tokens")
    theirs = make_tiny()
    run_loop(theirs, build_stage_optimizer(theirs, tmp_path, lr_fraction=0.1), make_conversations(60))
    assert greatest_difference(ours, theirs) > 1e-3


def run_middle_loop(model, optimizer, conversations):
    """All tokens of one stream, at rates that stay for 0.8 of the steps, with a momentum that rises."""
    model.train()
    stream = [token for row in conversations for token in row["input_ids"]]
    initial = [group["lr"] for group in optimizer.param_groups]
    for step in range(STEPS):
        for _ in range(MICRO_BATCHES):
            taken, stream = torch.tensor(stream[: ROWS * LENGTH + 1]), stream[ROWS * LENGTH + 1 :]
            inputs, targets = taken[:-1].view(ROWS, LENGTH), taken[1:]
            logits = model(input_ids=inputs, use_cache=False).logits
            (torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets) / MICRO_BATCHES).backward()
        progress, share = step / STEPS, min(step / 300, 1)
        for group, rate in zip(optimizer.param_groups, initial, strict=True):
            group["lr"] = rate * (1 if progress < 0.8 else 1 - (progress - 0.8) / 0.2)
            if "momentum" in group:
                group["momentum"] = (1 - share) * 0.85 + share * 0.95
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model


def test_ten_steps_of_mid_training_end_at_the_loops_weights(tmp_path, tokenizer):
    conversations = make_conversations(200).map(lambda row: {"labels": row["input_ids"]})
    ours, theirs = make_tiny(), make_tiny()
    trainer = build_trainer(
        tmp_path,
        tokenizer,
        model=ours,
        rows=StreamRows(conversations, length=LENGTH, batch_size=ROWS),
        loss_scale="nanochat",
        constant_fraction=0.8,
        callbacks=[MomentumWarmup(300)],
        max_steps=STEPS,
        per_device_train_batch_size=ROWS,
        gradient_accumulation_steps=MICRO_BATCHES,
        train_sampling_strategy="sequential",
    )
    trainer.train()
    trainer.finish()
    run_middle_loop(theirs, build_stage_optimizer(theirs, tmp_path, lr_fraction=0.1), conversations)
    assert greatest_difference(ours, make_tiny()) > 1e-2, "nothing was trained"
    assert greatest_difference(ours, theirs) < 1e-5

"""SFT by the Trainer beside loops written out by hand: same weights, packed or not, compiled parts or not."""

import pytest
import torch
from conftest import make_model
from peft import LoraConfig, get_peft_model
from tiny_finetuning import LENGTH, build_trainer, make_conversations

from chatmodel import LORA_TARGETS
from chatmodel.posttraining import build_stage_optimizer
from chatmodel.runtime import UserError


def document_loss(model, row):
    """Summed nats of a conversation alone in its row, by the model's own whole logits."""
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )


def train_by_hand(folder, conversations, steps, *, lr_fraction=0.1, **options):
    """Steps of lists of conversations, their nats over their trained tokens, at linearly falling rates."""
    model = make_model(max_position_embeddings=LENGTH, **options).train()
    optimizer = build_stage_optimizer(model, folder, lr_fraction=lr_fraction)
    for number, documents in enumerate(steps):
        rows = [conversations[document] for document in documents]
        trained = sum(label != -100 for row in rows for label in row["labels"][1:])
        (sum(document_loss(model, row) for row in rows) / trained).backward()
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * (1 - number / len(steps))
        optimizer.step()
        optimizer.zero_grad()
    return model


def assert_same_weights(ours, theirs, tolerance=1e-5):
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.data, other.data, atol=tolerance, rtol=0, msg=name)


@pytest.mark.parametrize(("compiled", "options"), [(False, {"window_pattern": "SL", "sliding_window": 5}), (True, {})])
def test_packed_training_is_that_of_each_conversation_alone(tmp_path, tokenizer, monkeypatch, compiled, options):
    """Also with the parts of compiled training; a step's loss is shared evenly by its trained tokens."""
    monkeypatch.setattr("torch.compile", lambda function, **settings: function)
    conversations = make_conversations()
    trainer = build_trainer(
        tmp_path,
        tokenizer,
        model=make_model(max_position_embeddings=LENGTH, **options),
        compiled=compiled,
        max_steps=4,
        gradient_accumulation_steps=2,
        train_sampling_strategy="sequential",
    )
    before = [type(module) for module in trainer.model.modules()]
    trainer.train()
    trainer.finish()
    assert [type(module) for module in trainer.model.modules()] == before
    rows = trainer.rows.rows
    steps = [[n for row in rows[4 * step : 4 * step + 4] for n in row] for step in range(4)]
    assert_same_weights(trainer.model, train_by_hand(tmp_path, conversations, steps, **options))


def test_gradient_of_a_packed_batch(tmp_path, tokenizer):
    """Loss and gradients to 1e-5 of those of the conversations alone."""
    conversations = make_conversations()
    trainer = build_trainer(tmp_path, tokenizer)
    trainer.create_optimizer()
    batch = trainer.rows.lay_out(trainer.rows.rows[:2])
    documents = [n for row in trainer.rows.rows[:2] for n in row]
    assert len(documents) > 2
    loss = trainer.loss(batch, divisor=None)
    loss.backward()
    plain = make_model(max_position_embeddings=LENGTH)
    expected = sum(document_loss(plain, conversations[n]) for n in documents) / batch["num_trained"]
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    for (name, ours), theirs in zip(trainer.model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_a_conversation_does_not_depend_on_its_neighbours(tmp_path, tokenizer):
    """Neither on what they say nor on how long they are."""
    trainer = build_trainer(tmp_path, tokenizer)
    trainer.create_optimizer()
    rows, lengths = trainer.rows, trainer.rows.ends - trainer.rows.begins
    last = int(lengths.argmin())
    others = [n for n in range(len(lengths)) if n != last and lengths[n] + lengths[last] <= LENGTH]
    found = []
    for neighbour in others[:3]:
        batch = rows.lay_out([[neighbour, last], [others[0]]])
        begin = int(lengths[neighbour])
        found.append(trainer.loss.measure(batch)[0, begin : begin + int(lengths[last])])
    alone = trainer.loss.measure(rows.lay_out([[last]]))[0, : int(lengths[last])]
    for nats in found:
        torch.testing.assert_close(nats, alone, atol=1e-5, rtol=0)


def with_adapter(model):
    torch.manual_seed(5)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=LORA_TARGETS, task_type="CAUSAL_LM", init_lora_weights=False)
    return get_peft_model(model, config)


def test_adapters_are_trained_and_nothing_else(tmp_path, tokenizer):
    """As a loop over each conversation alone trains them."""
    conversations = make_conversations()
    model = with_adapter(make_model(max_position_embeddings=LENGTH))
    trainer = build_trainer(tmp_path, tokenizer, model=model, max_steps=2, train_sampling_strategy="sequential")
    trainer.train()
    trainer.finish()
    plain = with_adapter(make_model(max_position_embeddings=LENGTH)).train()
    before = {name: parameter.detach().clone() for name, parameter in plain.named_parameters()}
    optimizer = build_stage_optimizer(plain, tmp_path, lr_fraction=0.1)
    for step in range(2):
        rows = [conversations[n] for row in trainer.rows.rows[2 * step : 2 * step + 2] for n in row]
        trained = sum(label != -100 for row in rows for label in row["labels"][1:])
        (sum(document_loss(plain, row) for row in rows) / trained).backward()
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * (1 - step / 2)
        optimizer.step()
        optimizer.zero_grad()
    assert_same_weights(trainer.model, plain)
    moved = {name for name, parameter in trainer.model.named_parameters() if not parameter.equal(before[name])}
    assert moved == {name for name in before if "lora_" in name}


def test_bf16_weights_are_rounded_from_masters_that_are_handed_on(tmp_path, tokenizer):
    """Updates far below what bf16 can add to a weight are not lost, and the first update starts from fp32 weights."""
    start = make_model(max_position_embeddings=LENGTH)
    model = make_model(max_position_embeddings=LENGTH)
    trainer = build_trainer(
        tmp_path, tokenizer, model=model, dtype=torch.bfloat16, max_steps=3, lr_fraction=1e-4, logging_steps=1
    )
    trainer.train()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    trainer.finish()
    for (name, moved), before in zip(model.named_parameters(), start.parameters(), strict=True):
        assert moved.dtype == torch.float32
        difference = float((moved - before).detach().abs().max())
        assert 0 < difference < 1e-3, name


def test_gradients_that_are_not_finite_stop_before_the_update(tmp_path, tokenizer):
    trainer = build_trainer(tmp_path, tokenizer, max_steps=3)
    trainer.create_optimizer()
    with torch.no_grad():
        trainer.model.lm_head.weight[3, 4] = float("nan")
    before = trainer.model.model.embed_tokens.weight.detach().clone()
    with pytest.raises(UserError, match="not finite at step 1"):
        trainer.train()
    assert torch.equal(trainer.model.model.embed_tokens.weight, before)

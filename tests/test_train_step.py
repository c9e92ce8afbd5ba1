"""One step of pretraining beside what the plain model and autograd give."""

from itertools import pairwise

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import make_model

from chatmodel.gradients import adding_gradients
from chatmodel.scaling import plan_run
from chatmodel.train_step import TrainStep

LENGTH = 24


@pytest.fixture(autouse=True)
def any_precision():
    """Accelerate keeps the first precision of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def build_step(model, **options) -> TrainStep:
    plan = plan_run(2, vocab_size=97, sequence_length=LENGTH, head_dim=16, max_steps=10, total_batch_tokens=4 * LENGTH)
    return TrainStep(model, plan, Accelerator(mixed_precision="no", cpu=True), device_batch_size=2, **options)


def make_batches() -> torch.Tensor:
    return torch.randint(97, (2, 2, LENGTH + 1), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("options", [{}, {"window_pattern": "SL", "sliding_window": 5}])
@pytest.mark.parametrize("compile", [False, True])
def test_documents_apart_are_documents_alone(options, compile, monkeypatch):
    """The gradient of rows that hold several documents is that of the documents, each in a row of its own."""
    monkeypatch.setattr("torch.compile", lambda function, **settings: function)  # the parts of compiled training
    options = {"max_position_embeddings": LENGTH} | options
    ids = make_batches()
    starts = [[0, 7, LENGTH, LENGTH + 3, LENGTH + 20, 2 * LENGTH], [0, 12, LENGTH, 2 * LENGTH, 2 * LENGTH, 2 * LENGTH]]
    model, alone = make_model(**options).train(), make_model(**options).train()
    step = build_step(model, compile=compile, documents_apart=True)
    for rows, places in zip(ids, starts, strict=True):
        batch = {"input_ids": rows[:, :-1], "shift_labels": rows[:, 1:]}
        loss = step.accumulate(batch | {"document_starts": torch.tensor(places, dtype=torch.int32)})
        inputs, labels = rows[:, :-1].flatten(), rows[:, 1:].flatten()
        total = torch.zeros(())
        for begin, end in pairwise(places):
            if begin < end:
                part = {"input_ids": inputs[None, begin:end], "shift_labels": labels[None, begin:end]}
                total = total + (end - begin) * alone(**part, labels=part["shift_labels"], use_cache=False).loss
        expected = total / (2 * LENGTH)
        (expected / 2).backward()
        torch.testing.assert_close(loss, expected.detach(), atol=1e-5, rtol=1e-5)
    for (name, ours), theirs in zip(model.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=2e-6, rtol=1e-4, msg=name)


def test_gradients_of_micro_batches_add_up():
    """As autograd adds them, in fp32, and nothing is left behind for the next step."""
    model, plain = (
        make_model(max_position_embeddings=LENGTH).train(),
        make_model(max_position_embeddings=LENGTH).train(),
    )
    step = build_step(model)
    for rows in make_batches():
        step.accumulate({"input_ids": rows[:, :-1], "shift_labels": rows[:, 1:]})
        labels = rows[:, 1:].contiguous()
        (plain(rows[:, :-1], labels=labels, shift_labels=labels, use_cache=False).loss / 2).backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=2e-6, rtol=1e-4)
    assert step.finish(0).updated
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_of_bf16_weights_add_up_in_fp32():
    """A sum of many small gradients after a large one, which bf16 would lose."""
    model = make_model(max_position_embeddings=LENGTH).train()
    plan = plan_run(2, vocab_size=97, sequence_length=LENGTH, head_dim=16, max_steps=10, total_batch_tokens=4 * LENGTH)
    TrainStep(model, plan, Accelerator(mixed_precision="bf16", cpu=True), device_batch_size=2)
    weight = model.lm_head.weight
    assert weight.dtype == torch.bfloat16
    for value in (1.0, *[2.0**-10] * 4):
        with adding_gradients(model):
            (weight.sum() * value).backward()
    assert weight.grad.dtype == torch.float32
    assert torch.equal(weight.grad, torch.full_like(weight.grad, 1 + 2**-8))


def test_kernels_chosen_again_leave_the_step_as_it_is(monkeypatch):
    """The parts of compiled training are exchanged once, whatever was in their place."""
    monkeypatch.setattr("torch.compile", lambda function, **settings: function)
    model = make_model(max_position_embeddings=LENGTH).train()
    own = [type(module) for module in model.modules()]
    step = build_step(model, compile=True)
    rows = make_batches().flatten(0, 1)
    halves = [{"input_ids": half[:, :-1], "shift_labels": half[:, 1:]} for half in rows.split(2)]
    losses = [step.accumulate(half) for half in halves]
    step.drop()
    step.choose_kernels(4)
    assert step.accumulation == 1
    whole = step.accumulate({"input_ids": rows[:, :-1], "shift_labels": rows[:, 1:]})
    torch.testing.assert_close(whole, sum(losses) / 2)
    with step.evaluating():
        assert [type(module) for module in model.modules()] == own

"""Gradients of micro-batches beside autograd's, launched and replayed; a CUDA graph is pretended here."""

import logging

import pytest
import torch
from accelerate import Accelerator
from conftest import make_model
from tiny_finetuning import LENGTH, build_trainer, make_conversations

from chatmodel.finetuning.rows import ConversationRows
from chatmodel.gradients import GraphedGradients, adding_gradients, check_graphs
from chatmodel.runtime import UserError
from chatmodel.scaling import plan_run
from chatmodel.train_step import TrainStep

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class PretendedGraph:
    """Computes anew what a graph of its kind would: from the same inputs, into the same tensors."""

    def __init__(self, graphs: GraphedGradients) -> None:
        self.graphs = graphs
        parameters = [p for p in graphs.model.parameters() if p.requires_grad]
        self.first = all(p.grad is None for p in parameters)
        before = [None if p.grad is None else p.grad.clone() for p in parameters]
        self.loss = graphs.add_gradients(graphs.inputs).fill_(float("nan"))  # nothing is computed while capturing
        self.gradients = {p: p.grad for p in parameters}
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad.copy_(parameter.grad.fill_(float("nan")) if gradient is None else gradient)

    def pool(self) -> str:
        return "memory"

    def replay(self) -> None:
        for parameter, gradient in self.gradients.items():
            parameter.grad = None if self.first else gradient
        self.loss.copy_(self.graphs.add_gradients(self.graphs.inputs))
        for parameter, gradient in self.gradients.items():
            gradient.copy_(parameter.grad)


@pytest.fixture
def captures(monkeypatch):
    """A device that captures, with room for it; how often it did so, as one entry each."""
    done = []

    def record(self, pool):
        assert (pool is None) == (not self.graphs)
        graph = PretendedGraph(self)
        done.append(graph.first)
        return graph, graph.loss

    monkeypatch.setattr(GraphedGradients, "_record", record)
    monkeypatch.setattr(GraphedGradients, "_has_room", staticmethod(lambda device: True))
    return done


def build(model, *, wanted=None) -> GraphedGradients:
    def add(batch):
        with adding_gradients(model):
            loss = model(batch["ids"], labels=batch["ids"], use_cache=False).loss
            loss.backward()
        return loss.detach()

    return GraphedGradients(add, model, wanted=wanted)


def draw(seed: int, rows: int = 2):
    return {"ids": torch.randint(97, (rows, 12), generator=torch.Generator().manual_seed(seed))}


def check_step(graphs: GraphedGradients, batches) -> None:
    """The losses and gradients of a step's micro-batches are those of each alone, bit for bit."""
    plain = make_model().train()
    plain.load_state_dict(graphs.model.state_dict())
    alone = build(plain)
    for batch in batches:
        assert torch.equal(graphs.add(batch), alone.add_gradients(batch))
    for ours, theirs in zip(graphs.model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    graphs.model.zero_grad()


def test_from_the_second_step_on_micro_batches_are_replayed(captures):
    """One graph of a first micro-batch and one of the others, of whatever batch and weights there are by then."""
    graphs = build(make_model().train())
    check_step(graphs, [draw(0), draw(1)])
    assert captures == []
    for step in range(1, 4):
        check_step(graphs, [draw(10 * step), draw(10 * step + 1), draw(10 * step + 2)])
        with torch.no_grad():
            for parameter in graphs.model.parameters():
                parameter.mul_(1.01)
    assert captures == [True, False]


def test_losses_are_kept_apart(captures):
    graphs = build(make_model().train())
    losses = []
    for seed in range(4):
        losses.append(graphs.add(draw(seed)))
        graphs.model.zero_grad()
    assert len({loss.item() for loss in losses}) == 4


def test_graphs_that_gave_their_memory_back_are_captured_again(captures):
    graphs = build(make_model().train())
    for step in range(4):
        check_step(graphs, [draw(2 * step), draw(2 * step + 1)])
        if step == 1:
            graphs.release()
            assert not graphs.inputs
            assert not graphs.graphs
            assert not graphs.gradients
    assert captures == [True, False, True, False]


def test_after_a_change_of_kernels_a_step_is_launched_first(captures):
    graphs = build(make_model().train())
    for step in range(4):
        check_step(graphs, [draw(step)])
        if step == 1:
            graphs.forget()
    assert captures == [True, True]
    assert graphs.graphs


def test_batches_of_another_shape_are_launched(captures):
    """Also twice in a row, in the middle of a step, and in other strides, for which code is compiled anew."""
    graphs = build(make_model().train())
    turned = {"ids": draw(5)["ids"].T.contiguous().T}
    for batches in ([draw(0)], [draw(1)], [draw(2), draw(3, rows=1), draw(4)], [turned], [draw(6, rows=3)], [draw(7)]):
        check_step(graphs, batches)
    assert captures == [True]


@pytest.mark.parametrize("working", [0, 1])
def test_what_cannot_be_captured_is_launched(captures, working, monkeypatch, caplog):
    """Said once; the gradients of the step are right, whichever of its micro-batches it was."""
    record = GraphedGradients._record

    def fail(self, pool):
        if len(captures) == working:
            graph = PretendedGraph(self)  # as far as it came, gradients are there that nobody computed
            assert graph.gradients
            raise RuntimeError("not while capturing\nmore")
        return record(self, pool)

    monkeypatch.setattr(GraphedGradients, "_record", fail)
    graphs = build(make_model().train())
    with caplog.at_level(logging.WARNING):
        for step in range(3):
            check_step(graphs, [draw(2 * step), draw(2 * step + 1)])
    assert [record.getMessage() for record in caplog.records] == [
        "micro-batches are not replayed as CUDA graphs (not while capturing); small models are slower without"
    ]


def test_what_is_wanted_and_cannot_be_captured_ends_in_a_sentence(monkeypatch):
    def fail(self, pool):
        raise RuntimeError("not while capturing")

    monkeypatch.setattr(GraphedGradients, "_record", fail)
    graphs = build(make_model().train(), wanted=True)
    check_step(graphs, [draw(0)])
    with pytest.raises(UserError, match="not while capturing; leave cuda_graphs out"):
        graphs.add(draw(1))


@pytest.mark.parametrize(("free", "replayed"), [(71, False), (73, True)])
def test_memory_for_graphs_is_there_twice(captures, free, replayed, monkeypatch, caplog):
    """100 bytes at most, 60 now, so 40 for a micro-batch or an update: 80 must be free, 8 of them held unused."""
    monkeypatch.undo()
    for name, value in (("memory_allocated", 60), ("memory_reserved", 68), ("max_memory_allocated", 100)):
        monkeypatch.setattr(f"torch.cuda.{name}", lambda device, value=value: value)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (free, 1000))
    monkeypatch.setattr(GraphedGradients, "_record", lambda self, pool: (PretendedGraph(self),) * 2)
    graphs = build(make_model().train())
    with caplog.at_level(logging.WARNING):
        check_step(graphs, [draw(0)])
        graphs._begin(draw(1))
    assert bool(graphs.inputs) == replayed
    assert ("could lack the memory" in caplog.text) == (not replayed)


def test_where_graphs_can_be():
    assert check_graphs(None, CUDA, compiled=True, divided=False)
    assert not check_graphs(False, CUDA, compiled=True, divided=False)
    for device, compiled, divided in ((CPU, True, False), (CUDA, False, False), (CUDA, True, True)):
        assert not check_graphs(None, device, compiled=compiled, divided=divided)
        with pytest.raises(UserError, match="cuda_graphs needs"):
            check_graphs(True, device, compiled=compiled, divided=divided)


def test_a_gradient_is_dropped_as_soon_as_it_is_added():
    """So that the head's, which is found first, is not held beside all activations."""
    model = make_model().train()
    head, embedding = model.lm_head.weight, model.model.embed_tokens.weight
    held = []
    embedding.register_hook(lambda gradient: held.append(head.grad))
    ids = draw(0)["ids"]
    for _ in range(2):
        with adding_gradients(model):
            model(ids, labels=ids, use_cache=False).loss.backward()
    assert held == [None, None]
    assert head.grad.any()
    assert embedding.grad.any()


def test_an_error_in_a_micro_batch_leaves_the_gradients_so_far():
    model = make_model().train()
    weight = model.lm_head.weight
    weight.grad = torch.ones_like(weight)
    with pytest.raises(RuntimeError, match="broken"), adding_gradients(model):
        raise RuntimeError("broken")
    assert torch.equal(weight.grad, torch.ones_like(weight))
    with adding_gradients(model):
        weight.sum().backward()
    assert torch.equal(weight.grad, torch.full_like(weight, 2))


def test_steps_of_replayed_micro_batches_move_the_weights_alike(captures, monkeypatch):
    """Bit for bit; an evaluation has the memory of the graphs, and other rows at once are launched first."""
    monkeypatch.setattr("chatmodel.train_step.check_graphs", lambda wanted, *_, **__: wanted is not False)
    plan = plan_run(2, vocab_size=97, sequence_length=12, head_dim=16, max_steps=10, total_batch_tokens=48)
    launched, replayed = (
        TrainStep(
            make_model(max_position_embeddings=12).train(),
            plan,
            Accelerator(mixed_precision="no", cpu=True),
            device_batch_size=2,
            cuda_graphs=wanted,
        )
        for wanted in (False, None)
    )
    assert launched._graphs is None
    for index in range(7):
        rows = draw(index, rows=4)["ids"]
        if index == 5:
            launched.choose_kernels(4)
            replayed.choose_kernels(4)
        for ids in rows.split(4 // replayed.accumulation):
            for step in (launched, replayed):
                step.accumulate({"input_ids": ids, "shift_labels": ids})
        assert replayed.finish(index) == launched.finish(index)
        if index == 2:
            with replayed.evaluating():
                assert not replayed._graphs.graphs
    for ours, theirs in zip(replayed.model.parameters(), launched.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert captures == [True, False, True, False, True]


def test_fine_tuning_with_replayed_micro_batches_is_the_same(captures, tmp_path, tokenizer, monkeypatch):
    """Bit for bit, with other numbers of trained tokens in each step; an evaluation has the memory of the graphs."""
    weights, shape = {}, {"length": LENGTH, "pad_token_id": 0, "batch_size": 2, "fixed": True}
    for wanted in (False, None):
        monkeypatch.setattr("chatmodel.finetuning.trainer.check_graphs", lambda wanted, *_, **__: wanted is not False)
        trainer = build_trainer(
            tmp_path,
            tokenizer,
            model=make_model(vocab_size=len(tokenizer), max_position_embeddings=LENGTH),
            rows=ConversationRows(make_conversations(), **shape),
            cuda_graphs=wanted,
            gradient_accumulation_steps=2,
            max_steps=6,
        )
        trainer.train()
        weights[wanted] = [p.detach().clone() for p in trainer.model.parameters()]
    assert captures == [True, False]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(weights[None], weights[False], strict=True))
    assert trainer.graphs.graphs
    trainer.evaluate()
    assert not trainer.graphs.graphs

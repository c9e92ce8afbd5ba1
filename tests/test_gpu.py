"""What only a CUDA device can show: the fused loss, the attention kernels, a step that is skipped without waiting."""

import time
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from conftest import make_model

from chatmodel.attention import CANDIDATES, AttentionShape, try_attention, works_here
from chatmodel.devices import time_repeated
from chatmodel.kernels.mlp import fused_mlp, plain_mlp
from chatmodel.losses import LanguageModelLoss, SoftcappedCrossEntropy, _plain_cross_entropy
from chatmodel.optim.groups import build_optimizer
from chatmodel.optim.schedule import apply_schedule
from chatmodel.scaling import plan_run
from chatmodel.train_step import TrainStep

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def forget_compiled_code():
    """All these models share one forward pass, and the compiler gives up on a function's ninth kind of input."""
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("vocab_size", [500, 4096, 5000, 32768, 65536])
@pytest.mark.parametrize("cap", [15.0, None])
def test_the_fused_cross_entropy_is_the_plain_one(vocab_size, cap):
    from chatmodel.kernels.cross_entropy import cross_entropy_in_place

    torch.manual_seed(0)
    logits = 8 * torch.randn(64, vocab_size, device="cuda", dtype=torch.bfloat16)
    targets = torch.randint(vocab_size, (64,), device="cuda")
    targets[5] = -100
    nats, gradient = _plain_cross_entropy(logits.clone(), targets, cap, True)
    fused = cross_entropy_in_place(logits, targets, cap, write_gradient=True)
    torch.testing.assert_close(fused, nats, atol=5e-3, rtol=1e-3)
    assert (logits.float() - gradient.float()).norm() < 5e-3 * gradient.float().norm()
    assert not logits[5].any()


def test_the_loss_module_agrees_with_the_model():
    model = make_model().cuda()
    ids = torch.randint(0, 97, (2, 33), device="cuda")
    expected = model(ids[:, :-1], labels=ids[:, :-1], shift_labels=ids[:, 1:].contiguous(), use_cache=False).loss
    expected.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    loss = LanguageModelLoss(model, chunk_tokens=24)(ids[:, :-1], ids[:, 1:])
    loss.backward()
    torch.testing.assert_close(loss, expected, atol=2e-3, rtol=1e-3)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=2e-3, rtol=2e-2)


def test_the_loss_holds_the_logits_of_one_chunk():
    hidden = torch.randn(8192, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(32768, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(32768, (8192,), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    SoftcappedCrossEntropy.apply(hidden, weight, targets, 15.0, 2048)
    chunk, gradients = 2048 * 32768 * 2, 4 * weight.numel() + 2 * hidden.numel()
    assert torch.cuda.max_memory_allocated() - before < 1.1 * chunk + gradients


@pytest.mark.parametrize("documents_apart", [False, True])
@pytest.mark.parametrize("window", [None, 64])
def test_kernels_that_work_here_are_right(window, documents_apart):
    shape = AttentionShape(2, 4, 512, 128, window, documents_apart)
    trials = {t.name: t for t in try_attention(shape, torch.device("cuda"), torch.bfloat16)}
    assert trials["sdpa"].milliseconds is not None
    assert all("wrong" not in trial.reason for trial in trials.values())


def make_long_model(seed: int = 0):
    """Heads of 128 and rows long enough for every kernel, with full and windowed layers."""
    model = make_model(
        seed,
        vocab_size=4096,
        hidden_size=256,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_hidden_layers=4,
        max_position_embeddings=512,
        sliding_window=128,
    )
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "embed" not in name:
            parameter.data *= 0.3  # near the sizes of training, where rounding to bf16 does little
    return model


@pytest.mark.parametrize("windowed", [c.name for c in CANDIDATES])
@pytest.mark.parametrize(
    "full", ["sdpa", "cudnn", "flash_attention_2", "flex", "flash_attention_3", "flash_attention_4"]
)
def test_a_compiled_step_has_the_gradients_of_the_model(windowed, full):
    """Every pair of kernels, compiled in bf16 with two micro-batches, beside the plain model in fp32."""
    device, shape = torch.device("cuda"), AttentionShape(4, 2, 512, 128, 128)
    if not works_here(windowed, shape, device, torch.bfloat16):
        pytest.skip(f"{windowed} does not work for windows here")
    if not works_here(full, replace(shape, window=None), device, torch.bfloat16):
        pytest.skip(f"{full} does not work here")
    check_compiled_step(windowed, full)


def check_compiled_step(windowed: str, full: str) -> None:
    plan = plan_run(4, vocab_size=4096, sequence_length=512, head_dim=128, max_steps=10, total_batch_tokens=4096)
    ids = torch.randint(0, 4096, (8, 513), device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    reference = make_long_model().cuda()
    labels = ids[:, 1:].contiguous()
    reference(ids[:, :-1], labels=labels, shift_labels=labels, use_cache=False).loss.backward()
    model = make_long_model()
    step = TrainStep(model, plan, Accelerator(mixed_precision="bf16"), device_batch_size=4)
    step._use_attention({128: windowed, None: full})
    step.loss_module.chunk_tokens = 500
    for rows in (slice(0, 4), slice(4, 8)):
        step.accumulate({"input_ids": ids[rows, :-1], "shift_labels": ids[rows, 1:]})
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        error = (ours.grad - theirs.grad).norm() / theirs.grad.norm()
        # The scalars' gradients are small differences of large sums, which bf16 blurs in the model's own parts too.
        assert error < (0.05 if ours.numel() > 1 else 1.0), (name, float(error))


def test_steps_on_the_device_follow_those_on_the_cpu():
    """Five steps compiled in bf16 move the weights as plain PyTorch in fp32 on the CPU does."""
    plan = plan_run(4, vocab_size=4096, sequence_length=512, head_dim=128, max_steps=10, total_batch_tokens=2048)
    # With other ids bf16 on the CPU is as far from fp32 as 0.88 in one matrix; with these 0.948 is its lowest.
    ids = torch.randint(0, 4096, (5, 4, 513), generator=torch.Generator().manual_seed(2))
    start, reference = make_long_model(), make_long_model()
    optimizer = build_optimizer(reference, plan.groups)
    model = make_long_model()
    step = TrainStep(model, plan, Accelerator(mixed_precision="bf16"), device_batch_size=4)
    for index, rows in enumerate(ids):
        reference(
            rows[:, :-1], shift_labels=rows[:, 1:].contiguous(), labels=rows[:, 1:], use_cache=False
        ).loss.backward()
        apply_schedule(optimizer, index, plan.schedule)
        optimizer.step()
        optimizer.zero_grad()
        step.accumulate({"input_ids": rows[:, :-1].cuda(), "shift_labels": rows[:, 1:].cuda()})
        assert step.finish(index).updated
    masters = step.optimizer.state
    for (name, ours), theirs, before in zip(
        model.named_parameters(), reference.parameters(), start.parameters(), strict=True
    ):
        moved, expected = masters[ours]["master"].cpu() - before.detach(), theirs.detach() - before.detach()
        alike = torch.nn.functional.cosine_similarity(moved.flatten(), expected.flatten(), dim=0)
        if ours.numel() > 1:
            assert alike > 0.9, (name, float(alike))
            assert float(moved.norm()) == pytest.approx(float(expected.norm()), rel=0.1), name


def test_a_step_that_is_not_finite_changes_nothing():
    plan = plan_run(2, vocab_size=97, sequence_length=64, head_dim=16, max_steps=10, total_batch_tokens=128)
    model = make_model(max_position_embeddings=64)
    step = TrainStep(model, plan, Accelerator(mixed_precision="bf16"), device_batch_size=2, compile=False)
    ids = torch.randint(0, 97, (2, 65), device="cuda")
    batch = {"input_ids": ids[:, :-1], "shift_labels": ids[:, 1:]}
    step.accumulate(batch)
    assert step.finish(0).updated
    before = [p.detach().clone() for p in model.parameters()]
    step.accumulate(batch)
    next(p for p in model.parameters() if p.ndim == 2).grad[0, 0] = float("nan")
    result = step.finish(1)
    assert not result.updated
    assert result.gradient_norm != result.gradient_norm
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    step.accumulate(batch)
    assert step.finish(1).updated


def test_a_call_is_timed_without_its_host():
    numbers = torch.zeros(8, device="cuda")

    def call():
        time.sleep(0.002)
        numbers.add_(1)

    assert time_repeated(call, numbers.device, repeats=2) < 5e-4


def test_the_fused_mlp_is_the_plain_one():
    from chatmodel.kernels import relu_squared

    torch.manual_seed(0)
    states, gradient = (torch.randn(2, 500, 384, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    up, down = (torch.randn(n, m, device="cuda", dtype=torch.bfloat16) / m**0.5 for n, m in ((1000, 384), (384, 1000)))
    assert relu_squared.UP_TILING.rows > 1
    results = []
    for function, dtype in ((fused_mlp, torch.bfloat16), (plain_mlp, torch.float32)):
        leaves = [part.to(dtype).requires_grad_() for part in (states, up, down)]
        output = function(*leaves)
        results.append([output, *torch.autograd.grad(output, leaves, gradient.to(dtype))])
    for got, true in zip(*results, strict=True):
        assert (got.float() - true).norm() < 0.01 * true.norm()


def test_a_compiled_step_with_the_fused_mlp_has_the_gradients_of_the_model(monkeypatch):
    import chatmodel.kernels.relu_squared  # noqa: F401  registers the operations

    monkeypatch.setattr("chatmodel.train_step.fused_mlp_pays", lambda **sizes: True)
    check_compiled_step("sdpa", "sdpa")


@pytest.mark.parametrize("documents_apart", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_replayed_micro_batches_have_the_gradients_of_launched_ones(accumulation, documents_apart):
    """Of other tokens in every step, after an update of the weights, and after an evaluation."""
    plan = plan_run(
        4, vocab_size=4096, sequence_length=512, head_dim=128, max_steps=10, total_batch_tokens=2048 * accumulation
    )
    launched, replayed = (
        TrainStep(
            make_long_model(),
            plan,
            Accelerator(mixed_precision="bf16"),
            device_batch_size=4,
            cuda_graphs=wanted,
            documents_apart=documents_apart,
        )
        for wanted in (False, True)
    )
    generator = torch.Generator().manual_seed(3)
    graphs = []
    for index in range(5):
        losses = []
        for _ in range(accumulation):
            ids = torch.randint(0, 4096, (4, 513), generator=generator).cuda()
            batch = {"input_ids": ids[:, :-1], "shift_labels": ids[:, 1:].contiguous()}
            if documents_apart:
                places = [0, 100 + 10 * index, 512, 1024, 1536, 1700, 2048, 2048]
                batch["document_starts"] = torch.tensor(places, device="cuda", dtype=torch.int32)
            losses.append([step.accumulate(batch) for step in (launched, replayed)])
        graphs.append(len(replayed._graphs.graphs))
        for ours, theirs in losses:
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
        for (name, ours), theirs in zip(replayed.model.named_parameters(), launched.model.parameters(), strict=True):
            error = (ours.grad.float() - theirs.grad.float()).norm() / theirs.grad.float().norm()
            # Some kernels add in an order of their own each time.
            assert error < (5e-3 if ours.numel() > 1 else 0.1), (index, name, float(error))
        assert replayed.finish(index).updated
        assert launched.finish(index).updated
        launched.model.load_state_dict(replayed.model.state_dict())
        if index == 2:
            with replayed.evaluating():
                assert not replayed._graphs.graphs
    assert graphs == [0] + [accumulation] * 4


@pytest.mark.parametrize("working", [0, 1])
def test_what_cannot_be_captured_is_launched_from_then_on(working, caplog):
    """A kernel that waits for the device ends a capture; its step and all others are right, and it is said once."""
    plan = plan_run(4, vocab_size=4096, sequence_length=512, head_dim=128, max_steps=10, total_batch_tokens=4096)
    step = TrainStep(make_long_model(), plan, Accelerator(mixed_precision="bf16"), device_batch_size=4)
    add, seen = step._graphs.add_gradients, []

    def wait(batch):
        loss = add(batch)
        if torch.cuda.is_current_stream_capturing():
            if len(seen) == working:
                loss.item()
            seen.append(True)
        return loss

    step._graphs.add_gradients = wait
    generator = torch.Generator().manual_seed(3)
    stream = torch.cuda.current_stream()
    for index in range(4):
        ids = torch.randint(0, 4096, (2, 4, 513), generator=generator).cuda()
        batches = [{"input_ids": rows[:, :-1], "shift_labels": rows[:, 1:].contiguous()} for rows in ids]
        for batch in batches:
            step.accumulate(batch)
        found = [parameter.grad.clone() for parameter in step.model.parameters()]
        step.drop()
        for batch in batches:
            step._losses.append(add(batch))
        for gradient, parameter in zip(found, step.model.parameters(), strict=True):
            error = (gradient - parameter.grad).norm() / parameter.grad.norm()
            assert error < (5e-3 if gradient.numel() > 1 else 0.1)
        assert step.finish(index).updated
    assert torch.cuda.current_stream() == stream
    assert len(seen) == working  # the call that waited did not come back
    assert caplog.text.count("not replayed as CUDA graphs") == 1
    torch.cuda.empty_cache()

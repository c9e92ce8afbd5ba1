"""What only a CUDA device can show: the fused loss, the attention kernels, a step that is skipped without waiting."""

import pytest
import torch
from accelerate import Accelerator
from conftest import make_model

from chatmodel.attention import AttentionShape, try_attention
from chatmodel.losses import LanguageModelLoss, _plain_cross_entropy
from chatmodel.scaling import plan_run
from chatmodel.train_step import TrainStep

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("vocab_size", [500, 4096, 5000, 32768, 65536])
@pytest.mark.parametrize("cap", [15.0, None])
def test_the_fused_cross_entropy_is_the_plain_one(vocab_size, cap):
    from chatmodel.cross_entropy_kernel import cross_entropy_in_place

    torch.manual_seed(0)
    logits = 8 * torch.randn(64, vocab_size, device="cuda", dtype=torch.bfloat16)
    targets = torch.randint(vocab_size, (64,), device="cuda")
    targets[5] = -100
    nats, gradient = _plain_cross_entropy(logits, targets, cap, True)
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


@pytest.mark.parametrize("window", [None, 64])
def test_kernels_that_work_here_are_right(window):
    trials = {
        t.name: t for t in try_attention(AttentionShape(2, 4, 512, 128, window), torch.device("cuda"), torch.bfloat16)
    }
    assert trials["sdpa"].milliseconds is not None
    assert all("wrong" not in trial.reason for trial in trials.values())


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

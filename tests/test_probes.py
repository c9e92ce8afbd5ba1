"""Probes: what works says so, what fails is reported and goes no further."""

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from chatmodel import attention, probes
from chatmodel.attention import AttentionShape, Trial, choose_attention
from chatmodel.probes import probe_attention, probe_device, run_probe

CPU = torch.device("cpu")


@pytest.fixture
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_a_failure_is_one_line():
    def fail() -> str:
        raise RuntimeError("first line\nsecond line")

    def fail_silently() -> str:
        raise AssertionError

    assert run_probe("it", fail) == probes.Probe("it", False, "fails: RuntimeError: first line")
    assert run_probe("it", fail_silently).text == "fails: AssertionError"
    assert run_probe("it", lambda: "fine") == probes.Probe("it", True, "fine")


def test_everything_works_on_a_cpu(fresh_accelerate, monkeypatch):
    monkeypatch.setattr(probes, "measure_copy", lambda device: 1e9)
    monkeypatch.setattr(probes, "measure_matmul", lambda device, dtype, sizes: 2e12)
    found = {probe.name: probe for probe in probe_device(CPU, torch.float32)}
    assert [name for name, probe in found.items() if not probe.works] == []
    assert found["copy"].text == "1 GB a second, read and written"
    assert found["matrix products"].text == "bf16 2 TFLOP/s, fp32 2 TFLOP/s"
    assert "all finite" in found["training step"].text


TRIALS = [
    Trial("flex", 0.5, "works"),
    Trial("blocks", 1.0, "works"),
    Trial("products", 2.0, "works"),
    Trial("cudnn", None, "fails here: no reason"),
]


@pytest.mark.parametrize(
    ("device", "used", "others"),
    [
        ("cuda", "flex, 0.50 ms", ["  blocks", "  products", "  cudnn"]),
        ("mps", "blocks, 1.00 ms", ["  flex", "  products"]),
        ("cpu", "products, 2.00 ms", ["  flex", "  blocks"]),
    ],
)
def test_the_attention_said_to_be_used_is_the_one_chosen(monkeypatch, device, used, others):
    """On a GPU the fastest that the model, compiled or not, can take; on a CPU what the rule says."""
    device = torch.device(device)
    for module in (probes, attention):
        monkeypatch.setattr(module, "try_attention", lambda shape, device, dtype: TRIALS)
    found = probe_attention(device, torch.float32)
    kinds = ["attention, full", "attention, windowed", "attention, documents"]
    assert [probe.name for probe in found] == [name for kind in kinds for name in (kind, *others)]
    assert found[0].text.startswith(used)
    assert ("(used: by rule" if device.type == "cpu" else "(used: the fastest)") in found[0].text
    shape = AttentionShape(2, 4, 512, 64, 128)
    chosen = choose_attention([shape], device, torch.float32, compiled=device.type == "cuda")
    assert chosen == {128: used.partition(",")[0]}


def test_documents_are_kept_apart_in_a_trial(monkeypatch):
    asked = []
    monkeypatch.setattr(probes, "try_attention", lambda shape, device, dtype: asked.append(shape) or TRIALS)
    probe_attention(CPU, torch.float32)
    assert [(shape.window, shape.documents_apart) for shape in asked] == [(None, False), (128, False), (None, True)]


def test_what_a_cpu_does_not_have_says_why(monkeypatch):
    assert probes._fuse_mlp(CPU, torch.float32) == (
        "plain matrix products (used: the fused kernel needs an NVIDIA GPU, and this is cpu)"
    )
    monkeypatch.setattr("chatmodel.kernels.fp8.importlib.util.find_spec", lambda name: None)
    assert probes._multiply_in_fp8(CPU).startswith("not available: fp8 needs torchao: pip install")
    monkeypatch.setattr("chatmodel.kernels.fp8.importlib.util.find_spec", lambda name: "there")
    assert probes._multiply_in_fp8(CPU).startswith("not available: fp8 needs an NVIDIA GPU of compute capability 8.9")


def test_a_gpu_says_what_the_fused_products_bring(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr("chatmodel.kernels.mlp.importlib.util.find_spec", lambda name: "there")
    monkeypatch.setattr(probes, "compare_mlps", lambda **sizes: (True, "fused (fused 1.00 ms, plain 2.00 ms)"))
    assert probes._fuse_mlp(cuda, torch.bfloat16).startswith("fused (fused 1.00 ms, plain 2.00 ms) for 16,384 tokens")
    assert "needs bf16" in probes._fuse_mlp(cuda, torch.float32)


def test_a_loss_that_is_wrong_is_found(monkeypatch):
    monkeypatch.setattr(probes.LanguageModelLoss, "forward", lambda self, ids, labels: torch.tensor(1.0))
    probe = run_probe("loss", lambda: probes._loss(CPU, torch.float32))
    assert not probe.works
    assert "1.0000 nats instead of 6." in probe.text


def test_gradients_that_are_not_finite_are_found(fresh_accelerate, monkeypatch):
    forward = probes.LanguageModelLoss.forward
    monkeypatch.setattr(
        probes.LanguageModelLoss, "forward", lambda self, **batch: forward(self, **batch) * float("nan")
    )
    probe = run_probe("training step", lambda: probes._train(CPU, torch.float32))
    assert not probe.works
    assert "in step 0" in probe.text

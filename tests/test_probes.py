"""Probes: what works says so, what fails is reported and goes no further."""

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from chatmodel import probes
from chatmodel.attention import Trial
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


def test_the_fastest_attention_is_the_one_used(monkeypatch):
    trials = [Trial("blocks", 1.0, "works"), Trial("dense", 2.0, "works"), Trial("cudnn", None, "needs a cuda device")]
    monkeypatch.setattr(probes, "try_attention", lambda shape, device, dtype: trials)
    found = probe_attention(CPU, torch.float32)
    assert [probe.name for probe in found] == ["attention, full", "  dense", "attention, windowed", "  dense"]
    assert found[0].text.startswith("blocks, 1.00 ms")
    assert found[1].text == "2.00 ms"


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

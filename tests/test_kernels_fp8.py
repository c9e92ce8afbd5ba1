"""fp8 layers share the weights of the layers they stand for, and are refused where they cannot run."""

import importlib.util

import pytest
import torch
from conftest import make_model
from torch import nn

from chatmodel.kernels.fp8 import build_fp8_converter, check_fp8
from chatmodel.runtime import UserError
from chatmodel.training_layers import TrainingLayers

needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao is not installed (the extra fp8)"
)


@needs_torchao
def test_a_converted_layer_shares_its_weight_and_rounds():
    linear = nn.Linear(32, 64, bias=False)
    converted = build_fp8_converter(emulate=True)(linear)
    assert converted.weight is linear.weight
    inputs = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    error = (converted(inputs) - linear(inputs)).norm() / linear(inputs).norm()
    assert 0.005 < error < 0.1  # e4m3 keeps three bits behind the point
    assert build_fp8_converter(emulate=True)(nn.Linear(12, 64)).weight.shape == (64, 12)
    assert type(build_fp8_converter(emulate=True)(nn.Linear(12, 64))) is nn.Linear


@needs_torchao
def test_a_model_trains_in_fp8_with_its_own_parameters():
    """The names and the parameters stay, the gradients are near those in fp32, and the parts come back."""
    model = make_model().train()
    ids = torch.randint(0, 97, (2, 24), generator=torch.Generator().manual_seed(1))
    model(ids, labels=ids, use_cache=False).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    parts = [type(module) for module in model.modules()]
    before = dict(model.named_parameters())
    layers = TrainingLayers(model, convert=build_fp8_converter(emulate=True))
    layers.install()
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in before.items()}
    converted = [m for m in model.modules() if type(m).__name__ == "Float8Linear"]
    assert len(converted) == 6 * model.config.num_hidden_layers
    model(ids, labels=ids, use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            alike = torch.cosine_similarity(parameter.grad.flatten(), expected[name].flatten(), dim=0)
            assert 0.7 < alike < 0.99999, (name, float(alike))
    layers.remove()
    assert [type(module) for module in model.modules()] == parts


@needs_torchao
@pytest.mark.parametrize(
    ("device", "capability", "options", "sentence"),
    [
        ("cpu", None, {}, "compute capability 8.9 or more"),
        ("cuda", (8, 0), {}, "compute capability 8.9 or more"),
        ("cuda", (9, 0), {"compiled": False}, "slower than bf16"),
        ("cuda", (9, 0), {"divided": True}, "does not go with FSDP"),
    ],
)
def test_where_it_is_refused(device, capability, options, sentence, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with pytest.raises(UserError, match=sentence):
        check_fp8(torch.device(device), **{"compiled": True, "divided": False} | options)


@needs_torchao
def test_where_it_is_not_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    check_fp8(torch.device("cuda"), compiled=True, divided=False)


def test_without_the_package(monkeypatch):
    monkeypatch.setattr("chatmodel.kernels.fp8.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install"):
        check_fp8(torch.device("cuda"), compiled=True, divided=False)

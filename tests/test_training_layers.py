"""The parts exchanged for training give the model's own outputs and gradients."""

import pytest
import torch
from conftest import make_model

from chatmodel.model.layers_gpt import GPTRotaryNorm
from chatmodel.training_layers import ReLUSquared, RotaryTable, TrainingLayers, rotary_norm


def test_relu_squared():
    states = torch.tensor([-2.0, 0.0, 0.5, 3.0], dtype=torch.float64, requires_grad=True)
    output = ReLUSquared.apply(states)
    assert output.tolist() == [0.0, 0.0, 0.25, 9.0]
    output.backward(torch.ones(4, dtype=torch.float64))
    assert states.grad.tolist() == [0.0, 0.0, 1.0, 6.0]


def test_rotary_norm_is_the_models(monkeypatch):
    model = make_model()
    rotary = model.model.rotary_emb
    positions = torch.arange(10)[None]
    states = torch.randn(2, 10, 3, model.config.head_dim, generator=torch.Generator().manual_seed(0))
    gradient = torch.randn_like(states)
    own, ours = states.clone().requires_grad_(), states.clone().requires_grad_()
    expected = GPTRotaryNorm(1e-6)(own, *(table.unsqueeze(2) for table in rotary(states, positions)))
    table = RotaryTable(rotary, 16)
    output = rotary_norm(ours, *(rows.unsqueeze(2) for rows in table(states, positions)), 1e-6)
    torch.testing.assert_close(output, expected, atol=1e-6, rtol=1e-5)
    expected.backward(gradient)
    output.backward(gradient)
    torch.testing.assert_close(ours.grad, own.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("options", [{}, {"window_pattern": "SL", "sliding_window": 5}])
def test_a_model_trains_as_it_did_and_gets_its_own_parts_back(options, compiled):
    """Compiled too: PyTorch 2.11 once lost gradients of these parts there, without a word."""
    model = make_model(**options).train()
    parts = [type(module) for module in model.modules()]
    ids = torch.randint(0, 97, (2, 24), generator=torch.Generator().manual_seed(1))
    model(ids, labels=ids, use_cache=False).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    layers = TrainingLayers(model)
    layers.install()
    assert [type(module) for module in model.modules()] != parts
    own_forward = model.model.forward
    if compiled:
        model.model.forward = torch.compile(own_forward, dynamic=False, fullgraph=True, backend="aot_eager")
    model(ids, labels=ids, use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=2e-6, rtol=1e-4)
    layers.remove()
    assert [type(module) for module in model.modules()] == parts

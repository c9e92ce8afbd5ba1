"""The compatible recipe trains with the project's own loss and optimizer, and its model becomes a Qwen3."""

import torch

from chatmodel import GPTForCausalLM
from chatmodel.export.conversions import to_qwen3
from chatmodel.losses import LanguageModelLoss
from chatmodel.optim.groups import build_optimizer
from chatmodel.scaling import plan_run


def test_a_few_steps():
    torch.manual_seed(0)
    plan = plan_run(2, vocab_size=64, sequence_length=32, recipe="compat", head_dim=32)
    model = GPTForCausalLM(plan.model_config())
    start = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = build_optimizer(model, plan.groups, lr_fraction=4.0)
    loss_of = LanguageModelLoss(model)
    rows = torch.arange(33).repeat(4, 1) * torch.tensor([[1], [3], [5], [7]]) % 64
    losses = []
    for _ in range(12):
        loss = loss_of(rows[:, :-1], rows[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
    still = [name for name, value in model.named_parameters() if torch.equal(value, start[name])]
    assert not still, "every weight is trained, the gate of the MLP too"
    torch.testing.assert_close(loss_of(rows[:, :-1], rows[:, 1:]), model(rows, labels=rows).loss)
    logits = model.eval()(rows[:, :-1]).logits
    assert logits.std() > 0.1
    assert (to_qwen3(model)(rows[:, :-1]).logits - logits).abs().max() <= 1e-5

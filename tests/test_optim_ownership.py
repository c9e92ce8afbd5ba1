"""Weights that belong to ranks: what becomes of their optimizer state when a checkpoint is made."""

import pytest
import torch
from accelerate import Accelerator
from tiny_pretraining import fork_ranks, wait

from chatmodel.optim.optimizer import MuonAdamW
from chatmodel.optim.ownership import Ownership


def gather(folder):
    """One step on each of two ranks, then the state for rank 0 alone, and for both."""
    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index
    torch.manual_seed(0)
    parameters = [torch.randn(4, size).requires_grad_() for size in (6, 8)]
    group = {"params": parameters, "kind": "adamw", "name": "head", "lr": 0.1, "betas": (0.9, 0.9), "eps": 1e-10}
    ownership = Ownership(parameters, rank=rank, world_size=2)
    optimizer = MuonAdamW([group | {"weight_decay": 0.0}], ownership=ownership)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.reduce_gradients()
    optimizer.step()
    torch.save([optimizer.state_dict(keep=rank == 0), optimizer.state_dict()], folder / f"{rank}.pt")


def test_state_is_gathered_where_it_is_kept(tmp_path):
    log = tmp_path / "log"
    assert wait(*fork_ranks(2, gather, tmp_path, log=log)) == [0, 0], log.with_suffix(".0").read_text()
    (main, whole), (other, everywhere) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert main["state"].keys() == whole["state"].keys() == everywhere["state"].keys() == {0, 1}
    for state in (main, everywhere):
        for number, kept in state["state"].items():
            for name, tensor in kept.items():
                torch.testing.assert_close(tensor, whole["state"][number][name])
    assert main["state"][0]["exp_avg"].mean() == pytest.approx(0.2)  # a tenth of two gradients of 1
    assert other["state"] == {}
    assert other["param_groups"] == main["param_groups"]

"""FSDP2 on two CPU ranks: the losses of one process, and checkpoints that both can continue from."""

import pytest
import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from tiny_pretraining import arguments, copy_run, fork, fork_ranks, make_run, train_and_save, wait, write_text
from torch.distributed.tensor import DTensor

from chatmodel.training.loop import Pretraining
from chatmodel.training.sharding import gather_model

pytestmark = pytest.mark.slow


def train_divided(run, text, **changes):
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["GPTDecoderLayer"],
        reshard_after_forward=True,
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    # Accelerate offers FSDP on accelerators only; PyTorch's works on CPUs just as well.
    shared = AcceleratorState._shared_state
    shared["distributed_type"], shared["fsdp_plugin"] = DistributedType.FSDP, plugin
    pretraining = Pretraining(arguments(run, text, **changes), run, accelerator)
    assert pretraining.train_step.divided
    pretraining.train()
    kept = [(key, value) for state in pretraining.train_step.optimizer.state.values() for key, value in state.items()]
    assert {key for key, value in kept if isinstance(value, DTensor)} == {"exp_avg", "exp_avg_sq"}
    assert {key for key, value in kept if not isinstance(value, DTensor)} == {"step", "momentum", "second_moment"}
    weights = gather_model(pretraining.train_step).state_dict()
    if pretraining.ranks.is_main:
        torch.save(weights, run.run_dir / "weights.pt")
        torch.save([pretraining.state.history, pretraining.state.evaluations], run.run_dir / "log.pt")


def check_near(found, expected):
    """Sums are taken in another order; it shows most in backout, which AdamW moves by 1.0 in all."""
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-2 if "backout" in name else 1e-4)


def test_divided_weights_train_as_whole_ones(tokenizer, tmp_path):
    text, log = write_text(tmp_path / "text"), tmp_path / "log"
    whole = make_run(tmp_path / "whole", tokenizer, text)
    divided = copy_run(whole, tmp_path / "divided")
    assert wait(fork(train_and_save, whole, text, log=log)) == [0], log.read_text()
    # With fewer steps in the plan the learning rates would differ, so the first part is ended by its own step count.
    assert wait(*fork_ranks(2, train_divided, divided, text, log=log)) == [0, 0], log.with_suffix(".0").read_text()
    (divided.checkpoints("base") / "step-00000008").rename(tmp_path / "last")
    assert wait(*fork_ranks(2, train_divided, divided, text, log=log)) == [0, 0], log.with_suffix(".0").read_text()
    assert "continuing from" in log.with_suffix(".0").read_text()
    losses = [record["loss"] for record in torch.load(whole.run_dir / "history.pt")]
    history, evaluations = torch.load(divided.run_dir / "log.pt")
    assert [record["loss"] for record in history] == pytest.approx(losses, rel=1e-5)
    assert [entry["step"] for entry in evaluations] == [0, 4, 8]
    weights = torch.load(whole.run_dir / "weights.pt")
    check_near(torch.load(divided.run_dir / "weights.pt"), weights)
    (divided.checkpoints("base") / "step-00000008").rename(tmp_path / "again")
    assert wait(fork(train_and_save, divided, text, log=log)) == [0], log.read_text()
    assert "it was saved by 2 ranks, now there are 1" in log.read_text()
    check_near(torch.load(divided.run_dir / "weights.pt"), weights)

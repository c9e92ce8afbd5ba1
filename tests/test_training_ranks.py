"""Agreement of ranks; what several really do is in test_training_kills.py."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType

from chatmodel.runtime import UserError
from chatmodel.training.ranks import Ranks, check_launch


@pytest.fixture
def alone():
    return Ranks(Accelerator(cpu=True), timeout=1.0)


def test_one_rank_agrees_with_itself(alone):
    assert alone.is_main
    assert alone.any(True, False) == [True, False]
    assert alone.minimum(7) == 7
    assert alone.gather("a") == ["a"]
    assert alone.take_from_main("b") == "b"
    with alone.main_first():
        pass


@pytest.mark.parametrize("asked", ["true", "false", None])
def test_fsdp_that_is_asked_for_in_vain_is_said(monkeypatch, caplog, asked):
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    if asked is not None:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", asked)
    check_launch(SimpleNamespace(distributed_type=DistributedType.MULTI_CPU, num_processes=2, is_main_process=True))
    assert ("FSDP is asked for and not used" in caplog.text) == (asked == "true")
    caplog.clear()
    check_launch(SimpleNamespace(distributed_type=DistributedType.FSDP, num_processes=2, is_main_process=True))
    assert not caplog.text


def test_processes_that_do_not_know_of_each_other_are_stopped(monkeypatch):
    """`accelerate launch` for GPUs, on a machine that has none, starts them all the same."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_launch(SimpleNamespace(distributed_type=DistributedType.MULTI_CPU, num_processes=2, is_main_process=True))
    with pytest.raises(UserError, match=r"2 processes were started.*ACCELERATE_USE_CPU=true"):
        check_launch(SimpleNamespace(distributed_type=DistributedType.NO, num_processes=1, is_main_process=True))


@pytest.mark.parametrize(
    "error",
    [
        dist.DistBackendError("NCCL error"),
        RuntimeError("[/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:21894"),
        RuntimeError("[/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 2000ms for recv operation"),
    ],
)
def test_a_lost_rank_is_one_sentence(alone, tmp_path, error):
    alone.count = 2
    sentence = r"rank 0 waited in vain for another rank.*last checkpoint"
    with pytest.raises(UserError, match=sentence), alone.explain_lost_rank(tmp_path):
        raise error


def test_other_errors_stay_what_they_are(alone, tmp_path):
    alone.count = 2
    with pytest.raises(RuntimeError, match="size mismatch"), alone.explain_lost_rank(tmp_path):
        raise RuntimeError("size mismatch")
    with pytest.raises(torch.OutOfMemoryError), alone.explain_lost_rank(tmp_path):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_only_the_main_rank_says_why(alone):
    with pytest.raises(UserError, match="the reason"):
        alone.end_together("the reason")
    alone.rank = 1
    with pytest.raises(SystemExit) as stop:
        alone.end_together("the reason")
    assert stop.value.code == 2

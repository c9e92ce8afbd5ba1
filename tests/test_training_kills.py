"""Processes killed without warning, anywhere, and started again by the user, by torchrun or on other ranks."""

import os
import random
import signal
import time

import pytest
import torch
from tiny_pretraining import (
    build,
    copy_run,
    find_late_word,
    fork,
    fork_ranks,
    make_run,
    train_and_save,
    wait,
    write_text,
)
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from chatmodel import checkpoint
from chatmodel.checkpoint import HashingFile, latest_checkpoint
from chatmodel.data.rows import PackedRows
from chatmodel.data.store import TokenStore
from chatmodel.train_step import TrainStep
from chatmodel.training.ranks import join_ranks

pytestmark = pytest.mark.slow

STEPS = 30


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "shards")


@pytest.fixture(scope="module")
def first(tmp_path_factory, tokenizer, text):
    return make_run(tmp_path_factory.mktemp("runs") / "first", tokenizer, text)


def results(run):
    """Weights and losses that a finished run left."""
    history = torch.load(run.run_dir / "history.pt")
    losses = [[record[key] for key in ("step", "loss", "gradient_norm", "lr_multiplier")] for record in history]
    return torch.load(run.run_dir / "weights.pt"), losses


def assert_identical(run, other):
    (weights, losses), (other_weights, other_losses) = results(run), results(other)
    assert losses == other_losses
    assert all(torch.equal(tensor, other_weights[name]) for name, tensor in weights.items())


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def patch(owner, name, count, *, after=False):
    """Let the process be killed before or after its `count`-th call of a function."""
    original = getattr(owner, name)
    calls = iter(range(1, 1_000_000))

    def call(*args, **kwargs):
        is_last = next(calls) == count
        if is_last and not after:
            die()
        result = original(*args, **kwargs)
        if is_last:
            die()
        return result

    setattr(owner, name, call)


def train_until_killed(where, count, run, text, **changes):
    """Train, to be killed in the middle of a step, while a checkpoint is written, or around its renaming."""
    if where == "step":
        patch(TrainStep, "accumulate", count)
    elif where == "writing":
        patch(HashingFile, "write", count)
    elif where == "before the renaming":
        patch(checkpoint, "publish_folder", count)
    elif where == "after the renaming":
        patch(checkpoint, "publish_folder", count, after=True)
    train_and_save(run, text, **changes)


def test_ten_kills_leave_no_trace(first, text, tmp_path):
    """At random places, in the middle of writing a checkpoint among them: the same weights, bit for bit."""
    log = tmp_path / "log"
    calm, killed = (copy_run(first, tmp_path / name) for name in ("calm", "killed"))
    assert wait(fork(train_and_save, calm, text, max_steps=STEPS, log=log)) == [0], log.read_text()
    chance = random.Random(20261122)
    places = ["step"] * 5 + ["writing"] * 3 + ["before the renaming", "after the renaming"]
    chance.shuffle(places)
    for where in places:
        # A step has two micro-batches, a checkpoint some two hundred writes; each life gets a few steps further.
        count = {"step": chance.randrange(1, 16), "writing": chance.randrange(1, 400)}.get(where, 1)
        child = fork(train_until_killed, where, count, killed, text, max_steps=STEPS, log=log)
        assert wait(child) == [-signal.SIGKILL], log.read_text()
    assert not (killed.run_dir / "weights.pt").exists()
    assert wait(fork(train_and_save, killed, text, max_steps=STEPS, log=log)) == [0], log.read_text()
    assert log.read_text().count("continuing from") >= 5
    assert_identical(killed, calm)


def work_elastically(run, text):
    """A rank under torchrun: the first two times, one of them is killed."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as it would be in a process not forked from torchrun
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(1)
    restarts = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if restarts == int(os.environ["RANK"]):
        patch(TrainStep, "begin_update", 6)
    join_ranks(timeout=60.0)
    train_and_save(run, text, max_steps=16)


def launch_elastically(run, text):
    """What `torchrun --nproc_per_node 2 --max_restarts 2` does, with workers that are forked."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        run_id="test",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=2,
        monitor_interval=0.05,
        start_method="fork",
    )
    elastic_launch(config, work_elastically)(run, text)


def test_torchrun_restarts_two_ranks_and_nothing_is_lost(first, text, tmp_path):
    log = tmp_path / "log"
    calm, killed = (copy_run(first, tmp_path / name) for name in ("calm", "killed"))
    assert wait(*fork_ranks(2, train_and_save, calm, text, max_steps=16, log=log)) == [0, 0]
    assert wait(fork(launch_elastically, killed, text, log=log)) == [0], log.read_text()
    # Two ranks, at least once: the first life may end before its first checkpoint is on the disk.
    assert log.read_text().count("continuing from") in (2, 4)
    assert_identical(killed, calm)


def train_with_trouble(trouble, run, text, *, step, rank=None, **changes):
    """Train; in one step something happens to one rank, or to all."""
    begin_update = TrainStep.begin_update

    def begin_with_trouble(self, number):
        if number == step and rank in (None, self.accelerator.process_index):
            trouble(self)
        return begin_update(self, number)

    TrainStep.begin_update = begin_with_trouble
    train_and_save(run, text, **changes)


def stop(step):
    os.kill(os.getpid(), signal.SIGUSR1)


def test_one_rank_and_two_are_the_same_run(first, text, tmp_path):
    """The same losses to rounding, also when a run is begun by one rank, continued by two and finished by one."""
    log = tmp_path / "log"
    alone, both, moved = (copy_run(first, tmp_path / name) for name in ("alone", "both", "moved"))
    assert wait(fork(train_and_save, alone, text, log=log)) == [0], log.read_text()
    assert wait(*fork_ranks(2, train_and_save, both, text, log=log)) == [0, 0]
    assert wait(fork(train_with_trouble, stop, moved, text, step=1, log=log)) == [2]
    assert wait(*fork_ranks(2, train_with_trouble, stop, moved, text, step=4, log=log)) == [2, 2]
    assert wait(fork(train_and_save, moved, text, log=log)) == [0], log.read_text()
    assert "stopped by SIGUSR1 after step 2, which is saved" in log.read_text()
    assert "it was saved by 1 ranks, now there are 2" in log.with_suffix(".0").read_text()
    assert "it was saved by 2 ranks, now there are 1" in log.read_text()
    weights, losses = results(alone)
    for run in (both, moved):
        other_weights, other_losses = results(run)
        assert other_losses == [pytest.approx(entry, rel=1e-5) for entry in losses]
        for name, tensor in weights.items():
            torch.testing.assert_close(other_weights[name], tensor, rtol=0, atol=1e-4)


def sleep(step):
    time.sleep(60)


@pytest.mark.parametrize("trouble", [die, sleep])
def test_a_rank_that_dies_or_hangs_does_not_hang_the_other(first, text, tmp_path, trouble):
    log = tmp_path / "log"
    run = copy_run(first, tmp_path / "run")
    ranks = fork_ranks(2, train_with_trouble, trouble, run, text, step=4, rank=1, rank_timeout=2.0, log=log)
    assert wait(ranks[0]) == [2]
    os.kill(ranks[1], signal.SIGKILL)  # torchrun would
    assert wait(ranks[1]) == [-signal.SIGKILL]
    said = log.with_suffix(".0").read_text()
    assert said.count("error: ") == 1
    assert "rank 0 waited in vain for another rank" in said
    assert latest_checkpoint(run.checkpoints("base")).name == "step-00000004"


def train_with_bad_word(run, text, word, **changes):
    pretraining = build(run, text, **changes)
    with torch.no_grad():
        pretraining.model.model.embed_tokens.weight[word] = float("nan")
    pretraining.train()


def test_all_ranks_end_when_one_finds_a_bad_loss(first, text, tmp_path):
    """A word that rank 1 alone sees, first in its row of step 3 or so: rank 0 names it, with rank 1's address."""
    log = tmp_path / "log"
    run = copy_run(first, tmp_path / "run")
    store = TokenStore.open(run.folder("data") / "train")
    number, word = find_late_word(PackedRows(store, sequence_length=32, seed=42), 16, of_rank=1)
    ranks = fork_ranks(2, train_with_bad_word, run, text, word, total_batch_tokens=64, log=log)
    assert wait(*ranks) == [2, 2]
    said = [log.with_suffix(f".{rank}").read_text() for rank in (0, 1)]
    assert f"became nan and the gradient's norm nan at step {number // 2}" in said[0]
    assert "it comes from rank 1, micro-batch 0, row 0" in said[0]
    assert said[0].count("error: ") == 1
    assert "error: " not in said[1]

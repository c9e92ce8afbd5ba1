"""What a run remembers: a history that stays small, random numbers, and copies that later steps cannot change."""

import random

import numpy as np
import pytest
import torch

from chatmodel.training import state as state_module
from chatmodel.training.state import TrainingClock, TrainState, capture_randomness, copy_to_host, restore_randomness

CPU = torch.device("cpu")


def test_the_loss_is_smoothed_without_bias():
    """By hand: after losses 4 and 2 the averages are 0.4 and 0.56; freed of their start, 4 and 0.56 / 0.19."""
    state = TrainState()
    state.add_loss(4.0)
    assert state.debiased_loss() == pytest.approx(4.0)
    state.add_loss(2.0)
    assert state.debiased_loss() == pytest.approx(0.56 / 0.19)


def test_speed_is_that_of_steps_that_did_not_compile():
    """Two processes: 9 s for the first step and 2 for two more, then 11 for a single one."""
    state = TrainState(step=3, train_seconds=11.0)
    state.count_first_step(since=2.0)
    assert (state.first_steps, state.first_step_seconds) == (1, 9.0)
    assert state.tokens_per_second(100) == 2 * 100 / 2.0
    state.step, state.train_seconds = 4, 22.0
    state.count_first_step(since=11.0)
    assert state.tokens_per_second(100) == 2 * 100 / 2.0
    lone = TrainState(step=1, train_seconds=4.0)
    lone.count_first_step(since=0.0)
    assert lone.tokens_per_second(100) == 25.0


def test_a_long_history_is_thinned_out_evenly(monkeypatch):
    monkeypatch.setattr(state_module, "HISTORY_POINTS", 8)
    state = TrainState()
    for step in [1, *range(10, 1001, 10)]:
        state.add_record({"step": step, "loss": 0.0}, every=10, is_last=step == 1000)
    steps = [record["step"] for record in state.history]
    assert steps == [1, 160, 320, 480, 640, 800, 960, 1000]


def test_a_saved_state_does_not_change_any_more():
    state = TrainState()
    saved = state.state_dict()
    state.add_record({"step": 1, "loss": 0.0}, every=10, is_last=False)
    assert saved["history"] == []
    again = TrainState()
    again.load_state_dict(state.state_dict())
    assert again == state


def test_random_numbers_go_on_where_they_were():
    kept = capture_randomness(CPU)
    drawn = (random.random(), np.random.rand(), np.random.randn(), torch.rand(()).item())
    restore_randomness(kept, CPU)
    assert drawn == (random.random(), np.random.rand(), np.random.randn(), torch.rand(()).item())


def test_a_copy_is_plain_and_its_own():
    weight = torch.arange(6.0).view(2, 3)
    state = {"whole": weight, "part": weight[1], "list": [torch.tensor(1, dtype=torch.int64)], "tuple": (1, None)}
    copy = copy_to_host(state, CPU)
    weight.zero_()
    assert copy["whole"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert copy["part"].untyped_storage().nbytes() == 12  # not the six values it was a view of
    assert copy["list"] == [torch.tensor(1)]
    assert copy["tuple"] == (1, None)
    assert copy_to_host(state, CPU, keep=False) is None


def test_the_clock_counts_what_it_is_asked_to(monkeypatch):
    now = iter([0.0, 3.0, 10.0, 14.0])
    monkeypatch.setattr(state_module.time, "perf_counter", lambda: next(now))
    clock = TrainingClock(CPU)
    assert clock.lap() == 3.0
    clock.restart()  # the seven seconds before it do not count
    assert clock.lap() == 4.0

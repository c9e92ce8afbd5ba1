"""Scores above chance, their standard errors and bootstrap, and tests of differences, against closed forms."""

import math

import numpy as np
import pytest

from chatmodel.evaluation.statistics import (
    binomial_stderr,
    center_accuracy,
    combine_seeds,
    find_interval,
    holm_adjust,
    mcnemar_p_value,
    mean_stderr,
    normal_p_value,
    pack_decisions,
    resample_sum,
    score_blocks,
    sum_stderr,
    summarize_score,
    summarize_task,
    unpack_decisions,
)


def test_centered_accuracy():
    assert center_accuracy(0.25, 0.25) == 0.0
    assert center_accuracy(1.0, 0.62) == 1.0
    # BoolQ of the seed's base model: (0.5603 - 0.62) / 0.38
    assert center_accuracy(0.5, 0.62) == pytest.approx(-0.12 / 0.38)


def test_standard_errors():
    assert binomial_stderr(0.5, 100) == pytest.approx(0.05)
    assert binomial_stderr(1.0, 100) == 0.0
    assert mean_stderr([0.3, 0.4]) == pytest.approx(0.25)


def test_summary_of_a_task():
    summary = summarize_task([True, False, False, True], baseline=0.25, seconds=1.23456)
    assert summary == {
        "accuracy": 0.5,
        "stderr": pytest.approx(0.25),
        "centered": pytest.approx(1 / 3),
        "centered_stderr": pytest.approx(0.25 / 0.75),
        "baseline": 0.25,
        "n": 4,
        "seconds": 1.235,
        "decisions": "90",
    }


def test_decisions_are_packed_four_to_a_digit():
    right = [True, False, True, True, False, False, False, True, True]
    assert pack_decisions(right) == "b180"
    assert unpack_decisions("b180", 9) == right


def make_tasks(seed=0):
    generator = np.random.default_rng(seed)
    sizes = {"easy": (400, 0.7, 0.25), "hard": (100, 0.3, 0.0), "boolq": (250, 0.6, 0.62)}
    return {
        name: summarize_task(list(generator.random(n) < p), baseline=baseline, seconds=1.0)
        for name, (n, p, baseline) in sizes.items()
    }


def test_the_bootstrap_agrees_with_the_closed_form():
    tasks = make_tasks()
    summary = summarize_score(tasks)
    assert summary["score"] == pytest.approx(np.mean([task["centered"] for task in tasks.values()]))
    # Independent tasks: the closed form is that of their centered standard errors.
    assert summary["stderr"] == pytest.approx(mean_stderr([task["centered_stderr"] for task in tasks.values()]))
    draws = resample_sum(score_blocks(tasks), num_resamples=20_000)
    assert draws.mean() == pytest.approx(summary["score"], abs=4 * summary["stderr"] / math.sqrt(20_000))
    assert draws.std() == pytest.approx(summary["stderr"], rel=0.02)
    low, high = summary["interval"]
    assert [low, high] == pytest.approx(
        [summary["score"] - 1.96 * summary["stderr"], summary["score"] + 1.96 * summary["stderr"]], abs=0.004
    )
    assert summary["interval"] == summarize_score(tasks)["interval"]  # seeded


def test_the_bootstrap_is_that_of_drawing_every_example():
    values = np.array([0.0, 1.0, 1.0, 0.0, 0.5, 1.0])
    fast = resample_sum([values], num_resamples=40_000)
    generator = np.random.default_rng(1)
    slow = values[generator.integers(0, 6, size=(40_000, 6))].mean(axis=1)
    assert fast.std() == pytest.approx(slow.std(), rel=0.02)
    assert find_interval(fast) == pytest.approx(find_interval(slow), abs=0.05)


def test_tasks_with_the_same_questions_are_resampled_together():
    right = [True] * 30 + [False] * 70
    tasks = {
        name: summarize_task(right, baseline=0.25, seconds=1.0) for name in ("hellaswag_zeroshot", "hellaswag", "piqa")
    }
    one = binomial_stderr(0.3, 100) / 0.75 / 3
    # The first two always agree: their errors add up, that of the third is independent.
    assert summarize_score(tasks)["stderr"] == pytest.approx(math.hypot(2 * one, one))
    opposite = tasks | {"hellaswag": summarize_task(right[::-1], baseline=0.25, seconds=1.0)}
    # Shares right in one, the other, both: 0.3, 0.3, 0 of 100, so the variance of the sum is 0.6 - 0.36.
    assert summarize_score(opposite)["stderr"] == pytest.approx(math.hypot(math.sqrt(0.24 / 100) / 0.75 / 3, one))


def test_several_seeds():
    combined = combine_seeds([0.20, 0.22, 0.24], example_stderr=0.01)
    assert combined["mean"] == pytest.approx(0.22)
    assert combined["spread"] == pytest.approx(0.02)
    assert combined["stderr"] == pytest.approx(math.sqrt(0.02**2 / 3 + 0.01**2))
    assert combined["num_seeds"] == 3
    alone = combine_seeds([0.20], example_stderr=0.01)
    assert math.isnan(alone["spread"])
    assert alone["stderr"] == 0.01


def test_p_values():
    assert normal_p_value(1.96, 1.0) == pytest.approx(0.05, abs=1e-4)
    assert [normal_p_value(0.0, 0.0), normal_p_value(0.1, 0.0)] == [1.0, 0.0]
    # 1 against 9 of ten coins: 2 * (1 + 10) / 1024
    assert mcnemar_p_value(1, 9) == mcnemar_p_value(9, 1) == pytest.approx(22 / 1024)
    assert mcnemar_p_value(4, 4) == mcnemar_p_value(0, 0) == 1.0
    assert 0 < mcnemar_p_value(2000, 2200) < 0.01


def test_holm_by_hand():
    # Sorted: 0.01 * 3, 0.02 * 2, 0.03 * 1; never below the one before.
    assert holm_adjust([0.03, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm_adjust([0.6, 0.5]) == [1.0, 1.0]


def test_the_standard_error_covers_the_truth():
    """Of 400 made-up evaluations, about 95 % of the intervals hold the true score."""
    generator = np.random.default_rng(0)
    truth = 0.35 / 2 + (0.5 - 0.25) / 0.75 / 2
    hits = 0
    for _ in range(400):
        blocks = [(generator.random(120) < 0.35) / 2, ((generator.random(200) < 0.5) - 0.25) / 0.75 / 2]
        score = sum(block.mean() for block in blocks)
        hits += abs(score - truth) < 1.96 * sum_stderr(blocks)
    assert 0.92 < hits / 400 < 0.98

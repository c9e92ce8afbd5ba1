"""Scores above chance and their standard errors."""

import pytest

from chatmodel.evaluation.statistics import binomial_stderr, center_accuracy, mean_stderr, summarize_task


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
        "n": 4,
        "seconds": 1.235,
    }

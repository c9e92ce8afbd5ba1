"""How the report writes single values."""

import math

import pytest

from chatmodel.report.formats import (
    clip_text,
    format_bytes,
    format_count,
    format_duration,
    format_flops,
    format_named,
    format_time,
    format_value,
    show_controls,
)
from chatmodel.report.plots import thin_points
from chatmodel.report.results import flatten_values
from chatmodel.report.stage_sections import thin_records
from chatmodel.report.tables import format_probability, probability_by_chance


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (12.34, "12.3 s"),
        (59.96, "59.9 s"),
        (270, "4.5 min"),
        (3599, "59.9 min"),
        (3600, "1 h 0 min"),
        (11700, "3 h 15 min"),
        (None, "not recorded"),
        ("soon", "soon"),
    ],
)
def test_format_duration(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (12, "12 bytes"),
        (2048, "2.0 KiB"),
        (7496.89 * 2**20, "7,496.9 MiB"),
        (24.1 * 2**30, "24.1 GiB"),
        (None, "not recorded"),
    ],
)
def test_format_bytes(size, text):
    assert format_bytes(size) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "not recorded"),
        (True, "yes"),
        (1234567, "1,234,567"),
        (0.2, "0.2000"),
        (0.00516397, "0.00516397"),
        (3e-5, "3e-05"),
        (math.nan, "nan"),
        (math.inf, "inf"),
        ([1, 0.5], "1, 0.5000"),
        ({"matrix": 0.02, "head": None}, "matrix: 0.0200, head: not recorded"),
        ("0123456789abcdef0123456789abcdef", "0123456789ab"),
        ("sha256:0123456789abcdef", "0123456789ab"),
        ("deadbeef is no hash", "deadbeef is no hash"),
    ],
)
def test_format_value(value, text):
    assert format_value(value) == text


def test_format_counts_flops_and_times():
    assert format_count(5075.0) == "5,075"
    assert format_count(math.nan) == "nan"
    assert format_flops(1872795e12) == "1.872795e18"
    assert format_flops(math.inf) == "inf"
    assert format_time("2025-10-27T01:25:05.123+02:00") == "2025-10-27 01:25:05"
    assert format_time("yesterday") == "yesterday"
    assert format_time(None) == "not recorded"


def test_format_named_reads_the_unit_from_the_key():
    assert format_named("total_flops", 1e18) == "1.000000e18"
    assert format_named("eval_seconds", 90) == "1.5 min"
    assert format_named("peak_memory_bytes", 2**20) == "1.0 MiB"
    assert format_named("tokens_per_second", 12345.6) == "12,346"
    assert format_named("mfu", 0.1631) == "16.31 %"
    assert format_named("mfu", None) == "not recorded"


def test_texts():
    assert clip_text("abc", 3) == "abc"
    assert clip_text("abcd", 3) == "abc… (4 characters)"
    assert show_controls("a\r\nb\tc\x00\x1b\ud800é\u202e") == "a\nb\tc\\x00\\x1b\\ud800é\\u202e"


def test_flatten_values():
    value = {"a": {"b": 1, "seconds": 5}, "history": [{}, {}], "c": {"not_run": "why"}, "d": {}}
    expected = [("a.b", "1"), ("a.seconds", "5.0 s"), ("history", "2 records"), ("c", "not run: why"), ("d", "none")]
    assert list(flatten_values(value)) == expected
    assert list(flatten_values({"a": None})) == [("a", "not recorded")]
    assert list(flatten_values({"a": {"b": None}}, null="none")) == [("a.b", "none")]


def test_thinning_keeps_means_and_ends():
    assert thin_points([(0.0, 1.0), (1.0, 3.0), (2.0, 5.0), (3.0, 7.0)], 2) == [(0.5, 2.0), (2.5, 6.0)]
    records = [{"step": i} for i in range(100)]
    assert [record["step"] for record in thin_records(records, 4)] == [0, 33, 66, 99]


@pytest.mark.parametrize(
    ("correct", "n", "chance", "expected"),
    [
        (2, 3, 0.5, 0.5),  # (3 + 1) / 8
        (3, 3, 0.25, 1 / 64),
        (0, 3, 0.25, 1.0),
        (1, 3, 0.0, 0.0),
        (5, 3, 0.5, None),
        (1, 3, None, None),
    ],
)
def test_probability_by_chance(correct, n, chance, expected):
    assert probability_by_chance(correct, n, chance) == (expected if expected is None else pytest.approx(expected))


def test_probability_by_chance_of_many_examples_is_the_normal_tail():
    # n = 10,000, chance 1/4: mean 2,500, deviation 43.3; 2,600 is 2.298 deviations up (with continuity): 0.01078.
    assert probability_by_chance(2600, 10_000, 0.25) == pytest.approx(0.01078, rel=0.03)
    assert format_probability(0.0121) == "0.012"
    assert format_probability(1e-12) == "< 1e-9"
    assert format_probability(None) == "not recorded"

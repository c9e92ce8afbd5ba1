"""What was predicted beside what happened: the lines before a run, the table after it."""

import json
from dataclasses import replace

import pytest

from chatmodel.devices import describe_named
from chatmodel.estimate.prediction import predict_run
from chatmodel.estimate.setup import Setup
from chatmodel.estimate.speed import Speed
from chatmodel.report import render_report
from chatmodel.report.document import Table
from chatmodel.report.prediction import compare_prediction, describe_plan
from chatmodel.report.results import StageResult
from chatmodel.runs import Run
from chatmodel.runtime import write_json
from chatmodel.scaling import plan_run


@pytest.fixture
def plan():
    return plan_run(4, vocab_size=512, sequence_length=128, train_tokens=40_960, total_batch_tokens=4096)


@pytest.fixture
def prediction(plan):
    """1,000 tokens a second; 40.96 s of training, three validations of 1,000 tokens at 0.4, and compilation."""
    setup = Setup(
        device=describe_named("H200"),
        precision="bf16",
        compiled=True,
        device_batch_size=16,
        eval_every=5,
        eval_tokens=1000,
        data_is_ready=True,
        hourly_rate=3.6,
    )
    return predict_run(plan, setup, speed=Speed(0.001, 0.0, 1.5, "given by hand"))


def finished(prediction, **metrics) -> StageResult:
    measured = {"train_seconds": 126.92, "first_step_seconds": 45.0}
    measured |= {"tokens_per_second": 500.0, "peak_memory_bytes": prediction.peak_memory_bytes}
    record = {"seconds": 2 * prediction.total_seconds, "metrics": {"prediction": prediction.as_dict(), **measured}}
    record["metrics"] |= metrics
    return StageResult("base", json.loads(json.dumps(record)), False, "runs/x")


def test_a_plan_is_told_in_lines(plan, prediction):
    lines = dict(describe_plan(plan, prediction, lr_fraction=2.0))
    assert lines["steps"] == "10 of 4,096 tokens"
    assert lines["a step is"] == "2 x 16 rows of 128 tokens on 1 device(s)"
    assert f"matrix {2 * plan.groups['matrix'].lr:.3g}" in lines["learning rates"]
    assert lines["speed"].startswith("1,000 tokens a second (667 to 1,500)")
    assert lines["time"] == "2.2 min (1.5 min to 3.3 min): compiling 1.5 min, training 41.0 s, validation 1.2 s"
    assert lines["cost"] == "$0.13 at $3.60 an hour"
    assert lines["known by"] == "given by hand"
    assert "weights" in lines["memory"]
    assert "checkpoints" in lines["disk"]


def test_without_a_price_there_is_no_cost(plan, prediction):
    assert "cost" not in dict(describe_plan(plan, replace(prediction, cost=None, hourly_rate=None), lr_fraction=1.0))


def test_ratios_of_what_happened_to_what_was_predicted(prediction):
    table, facts = compare_prediction(finished(prediction, disk_bytes=prediction.disk_kept_bytes // 2))
    assert isinstance(table, Table)
    assert "given by hand" in table.caption
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["Training time behind it"] == ("41.0 s", "1.4 min", "2.00")
    assert rows["First step, which may compile"] == ("1.5 min", "45.0 s", "0.50")
    assert rows["Time of the whole stage"][2] == "2.00"
    assert rows["Tokens per second"] == ("1,000", "500", "0.50")
    assert rows["Peak memory of a device"][2] == "1.00"
    assert rows["Disk, afterwards"][2] == "0.50"
    assert rows["Cost (USD)"] == ("0.13", "0.26", "2.00")
    assert dict(facts.rows)["Devices"] == "1 x H200"


def test_what_was_not_recorded_is_said(prediction):
    rows = {row[0]: row[1:] for row in compare_prediction(finished(prediction))[0].rows}
    assert rows["Disk, afterwards"][1:] == ("not recorded", "not recorded")


def test_nothing_is_compared_where_nothing_was_predicted():
    assert compare_prediction(StageResult("base", {"metrics": {"train_seconds": 1.0}}, False, "runs/x")) == []


def test_the_table_is_in_the_report(prediction, tmp_path):
    run = Run(tmp_path)
    record = finished(prediction, disk_bytes=5).record
    write_json(run.result_path("base"), {"stage": "base", "id": "1", "started": None, "finished": None, **record})
    render_report(run)
    text = run.run_dir.joinpath("report.md").read_text()
    assert "Predicted before the start (given by hand), and what happened" in text
    assert "prediction.seconds" not in text  # shown as a table, not once more as it is
    assert "disk_bytes" not in text

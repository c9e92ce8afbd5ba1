"""Progress over tasks of different size."""

import pytest

from chatmodel.evaluation import progress
from chatmodel.evaluation.progress import WorkProgress, spell


def test_shares_are_weighted_by_work(monkeypatch, caplog):
    caplog.set_level("INFO")
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with WorkProgress("CORE", {"small": 1.0, "large": 3.0}) as work:
        work.finish("small")
        assert work.done() == pytest.approx(0.25)
        now[0] += 90
        work.advance("large", 0.5)
        assert work.done() == pytest.approx(0.625)
        # 90 s for 0.625 of the work
        assert work.seconds_left() == pytest.approx(54.0)
        work.advance("large", 0.9)
        assert work.done() == pytest.approx(1.0)
    assert [record.message for record in caplog.records] == ["CORE: 62 % done, about 54 s left"]


def test_durations_have_one_unit():
    assert [spell(seconds) for seconds in (5, 119, 121, 7300)] == ["5 s", "119 s", "2 min", "2 h"]

"""Progress over items, and over tasks of different size."""

import pytest

from chatmodel import progress
from chatmodel.progress import ItemProgress, WorkProgress, spell


def test_items_are_told_a_minute_apart_where_there_is_no_terminal(monkeypatch, caplog):
    caplog.set_level("INFO")
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    totals = {"known": 8, "unknown": None, "hidden": 8}
    for label, total in totals.items():
        with ItemProgress(label, unit="reply", total=total, shown=label != "hidden") as bar:
            for _ in range(5):
                now[0] += 31
                bar.update()
    assert [record.message for record in caplog.records] == [
        "known: 2 of 8, 0.0323 reply/s, about 3 min left",
        "known: 4 of 8, 0.0323 reply/s, about 2 min left",
        "unknown: 2, 0.0323 reply/s",
        "unknown: 4, 0.0323 reply/s",
    ]


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

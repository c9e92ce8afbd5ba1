"""Packing against cases worked by hand and against a plain search through a list."""

import json
from collections import Counter

import numpy as np
import pytest

from chatmodel.data.packing import BestFitPlan, ContiguousPlan, cut_documents


def make_offsets(lengths: list[int]) -> np.ndarray:
    return np.cumsum([0, *lengths])


def best_fit(
    lengths: list[int], row_tokens: int, *, buffer: int = 100, epochs: int | None = 1, seed: int = 0, whole=False
):
    offsets = make_offsets(lengths)
    return BestFitPlan(offsets, row_tokens, epochs=epochs, seed=seed, buffer_documents=buffer, keep_rests=whole)


def take_rows(plan, number: int) -> list:
    return [plan.next_row() for _ in range(number)]


def take_all(plan) -> list:
    rows = []
    while (row := plan.next_row()) is not None:
        rows.append(row)
    return rows


def row_lengths(rows) -> list[list[int]]:
    return [[stop - start for start, stop in row] for row in rows]


def test_best_fit_by_hand():
    # All eight are buffered. Row 1: 7 fits in 10, then 3. Row 2: 6, then 4. Row 3: 5, 2, 2, and 1 is left: nothing
    # fits, so the shortest, 12, is cropped to 1. Nothing is left then.
    rows = take_all(best_fit([2, 12, 5, 7, 3, 2, 6, 4], 10))
    assert row_lengths(rows) == [[7, 3], [6, 4], [5, 2, 2, 1]]
    assert rows[0] == [(19, 26), (26, 29)]  # 2 + 12 + 5 = 19
    assert rows[2][-1] == (2, 3)  # the head of the document of 12


def test_best_fit_crops_the_shortest():
    # 9 leaves 1, where nothing fits: of 6 and 8 the shorter is cropped to 1. Then 8 alone cannot fill a row.
    rows = take_all(best_fit([9, 6, 8], 10))
    assert rows == [[(0, 9), (9, 10)]]
    # Longer than a row: cropped from its beginning when nothing else is left.
    assert take_all(best_fit([25, 30], 10)) == [[(0, 10)], [(25, 35)]]


def test_best_fit_sees_no_further_than_its_buffer():
    lengths = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    order = np.random.default_rng((0, 0)).permutation(10)
    first = best_fit(lengths, 11, buffer=1).next_row()
    # With a buffer of one there is no choice: documents come in their order, the last one cropped.
    expected = []
    for document in order:
        expected.append(min(lengths[document], 11 - sum(expected)))
        if sum(expected) == 11:
            break
    assert row_lengths([first]) == [expected]


def plain_best_fit(
    order, lengths: list[int], row_tokens: int, buffer: int, number: int
) -> list[list[tuple[int, int]]]:
    """(document, tokens) of each row, by the algorithm in words: search the whole buffer every time."""
    documents = iter(order)
    waiting: list[int] = []
    rows = []
    for _ in range(number):
        row: list[tuple[int, int]] = []
        while (room := row_tokens - sum(tokens for _, tokens in row)) > 0:
            while len(waiting) < buffer:
                waiting.append(next(documents))
            fitting = [document for document in waiting if lengths[document] <= room]
            if fitting:
                chosen = max(fitting, key=lambda document: lengths[document])  # the first of the longest
                row.append((chosen, lengths[chosen]))
            else:
                chosen = min(waiting, key=lambda document: lengths[document])
                row.append((chosen, room))
            waiting.remove(chosen)
        rows.append(row)
    return rows


@pytest.mark.parametrize("row_tokens", [1, 7, 33, 300])
def test_best_fit_equals_the_plain_search(row_tokens):
    lengths = np.random.default_rng(1).integers(1, 60, size=4_000).tolist()
    offsets = make_offsets(lengths)
    order = np.random.default_rng((5, 0)).permutation(len(lengths)).tolist()
    expected = plain_best_fit(order, lengths, row_tokens, buffer=20, number=40)
    rows = take_rows(best_fit(lengths, row_tokens, buffer=20, seed=5), 40)
    found = [
        [(int(np.searchsorted(offsets, start, "right")) - 1, stop - start) for start, stop in row] for row in rows
    ]
    assert found == expected


def test_best_fit_rows_are_full_and_use_each_document_once():
    lengths = np.random.default_rng(2).integers(1, 50, size=500).tolist()
    rows = take_all(best_fit(lengths, 64, buffer=50))
    assert all(sum(row) == 64 for row in row_lengths(rows))
    starts = Counter(start for row in rows for start, _ in row)
    assert max(starts.values()) == 1
    assert set(starts) <= set(make_offsets(lengths)[:-1].tolist())
    assert sum(map(sum, row_lengths(rows))) > 0.9 * sum(lengths)


def test_best_fit_epochs_come_in_other_orders():
    lengths = np.random.default_rng(3).integers(5, 30, size=40).tolist()
    plan = best_fit(lengths, 32, epochs=None, buffer=5)
    first, second = take_rows(plan, 15), take_rows(plan, 15)
    assert first != second
    assert plan.epoch >= 1
    counts = Counter(start for row in take_rows(best_fit(lengths, 32, epochs=3, buffer=5), 30) for start, _ in row)
    assert max(counts.values()) <= 3
    assert take_rows(best_fit(lengths, 32, seed=1), 3) != take_rows(best_fit(lengths, 32, seed=2), 3)


def test_best_fit_buffers_no_more_than_there_is():
    plan = best_fit([5, 6, 7], 8, epochs=None, buffer=1_000)
    plan.next_row()
    assert len(plan.state_dict()["buffer"]) <= 3


def test_documents_are_cut_by_hand():
    # Documents of 3, 10, 4 and 5 tokens, rows of 4.
    starts, stops = cut_documents(make_offsets([3, 10, 4, 5]), 4)
    assert starts.tolist() == [0, 3, 7, 11, 13, 17, 21]
    assert stops.tolist() == [3, 7, 11, 13, 17, 21, 22]


def test_best_fit_with_rests_by_hand():
    # 9 leaves 1, where nothing fits: 6 is cropped to 1, its rest of 5 goes back. Row 2: 8, then 5 is cropped to 2, and
    # the last 3 fill no row.
    rows = take_all(best_fit([9, 6, 8], 10, whole=True))
    assert rows == [[(0, 9), (9, 10)], [(15, 23), (10, 12)]]
    # Longer than a row: 25 and 30 become rows of 10, and the rest of 5.
    rows = take_all(best_fit([25, 30], 10, whole=True))
    assert sorted(rows) == [[(0, 10)], [(10, 20)], [(25, 35)], [(35, 45)], [(45, 55)]]


def test_best_fit_with_rests_loses_nothing():
    """Every token is in a row once an epoch, but for less than a row at the very end, however long the documents."""
    lengths = np.random.default_rng(4).integers(1, 200, size=400).tolist()
    rows = take_all(best_fit(lengths, 64, buffer=20, whole=True))
    seen = Counter(position for row in rows for start, stop in row for position in range(start, stop))
    assert max(seen.values()) == 1
    assert sum(lengths) - len(seen) < 64
    cropped = take_all(best_fit(lengths, 64, buffer=20))
    assert sum(map(sum, row_lengths(cropped))) < 0.7 * sum(lengths)


def test_contiguous_by_hand():
    # 14 tokens, rows of 4 that overlap by one: they begin at 0, 3, 6 and 9; what is left, 13, is no whole row.
    rows = take_all(ContiguousPlan(14, 4, epochs=1, seed=0))
    assert sorted(rows) == [[(0, 4)], [(3, 7)], [(6, 10)], [(9, 13)]]
    assert take_all(ContiguousPlan(5, 5, epochs=3, seed=0)) == [[(0, 5)]] * 3
    assert take_all(ContiguousPlan(6, 5, epochs=1, seed=0)) == [[(0, 5)]]


def test_contiguous_epochs_are_shuffled_and_cut_anew():
    plan = ContiguousPlan(1_000, 11, epochs=None, seed=0)
    epochs = [take_rows(plan, 98) for _ in range(4)]
    assert [row for (row,) in epochs[0]] != sorted(row for (row,) in epochs[0])
    offsets = {min(start for ((start, _),) in epoch) for epoch in epochs}
    assert len(offsets) > 1
    assert all(stop <= 1_000 and stop - start == 11 for epoch in epochs for ((start, stop),) in epoch)


def test_contiguous_covers_every_label_once():
    rows = take_all(ContiguousPlan(101, 6, epochs=1, seed=3))
    labels = [position for ((start, stop),) in rows for position in range(start + 1, stop)]
    assert sorted(labels) == list(range(1, 101))


PLANS = {
    "contiguous": lambda: ContiguousPlan(90, 8, epochs=None, seed=4),
    "best_fit": lambda: best_fit([3, 9, 4, 20, 7, 7, 5, 7, 2, 11, 3, 8], 10, buffer=4, epochs=None, seed=4),
    "best_fit, two epochs": lambda: best_fit([3, 9, 4, 20, 7, 7, 5, 7, 2, 11, 3, 8], 10, buffer=4, epochs=2, seed=4),
}


@pytest.mark.parametrize("name", PLANS)
def test_resuming_is_exact_after_every_row(name):
    uninterrupted = PLANS[name]()
    states, rows = [uninterrupted.state_dict()], []
    for _ in range(60):
        rows.append(uninterrupted.next_row())
        states.append(json.loads(json.dumps(uninterrupted.state_dict())))  # as it comes back from a file
    for number, state in enumerate(states[:-1]):
        resumed = PLANS[name]()
        take_rows(resumed, 3)  # whatever it did before is forgotten
        resumed.load_state_dict(state)
        assert take_rows(resumed, 60 - number) == rows[number:], number

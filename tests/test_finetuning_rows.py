"""Rows of conversations: packed as tightly as best fit does, each conversation whole, labels within it."""

import numpy as np
import pytest
from datasets import Dataset

from chatmodel.finetuning.rows import ConversationRows, StreamRows, pack_best_fit
from chatmodel.runtime import UserError


def make_conversations(lengths, seed=0):
    """Ids that tell conversation and place, 100 * conversation + place; the first half of each is not trained."""
    ids = [[100 * (n + 1) + place for place in range(length)] for n, length in enumerate(lengths)]
    labels = [[-100] * (len(row) // 2) + row[len(row) // 2 :] for row in ids]
    sources = ["GSM8K" if n % 2 else "SmolTalk" for n in range(len(lengths))]
    return Dataset.from_dict({"input_ids": ids, "labels": labels, "source": sources})


def test_best_fit_by_hand():
    # 7 opens a row; 6 opens one (4 left); 4 fits the second exactly; 3 fits the first exactly; 2 opens a third.
    assert pack_best_fit(np.array([2, 3, 6, 7, 4]), 10) == [[0], [1, 3], [2, 4]]


def test_every_document_is_in_one_row_that_holds_it():
    lengths = np.random.default_rng(0).integers(1, 65, size=2000)
    rows = pack_best_fit(lengths, 64)
    assert sorted(number for row in rows for number in row) == list(range(2000))
    assert max(lengths[row].sum() for row in rows) <= 64
    assert lengths.sum() / (64 * len(rows)) > 0.98
    assert rows == sorted(rows)


@pytest.mark.parametrize("fixed", [False, True])
def test_a_batch_by_hand(fixed):
    rows = ConversationRows(make_conversations([4, 3, 2]), length=6, batch_size=3, pad_token_id=9, fixed=fixed)
    assert rows.rows == [[0, 2], [1]]
    batch = rows.collate([rows.dataset[0], rows.dataset[1]])
    empty = [[9] * 6] if fixed else []
    assert batch["input_ids"].tolist() == [[100, 101, 102, 103, 300, 301], [200, 201, 202, 9, 9, 9], *empty]
    x = -100
    labels = [[x, 102, 103, x, 301, x], [201, 202, x, x, x, x], *([[x] * 6] if fixed else [])]
    assert batch["shift_labels"].tolist() == labels
    assert batch["position_ids"][:2].tolist() == [[0, 1, 2, 3, 0, 1], [0, 1, 2, 0, 0, 0]]
    starts = [0, 4, 6, 9, 12, *([18] * 5 if fixed else [])]
    assert batch["document_starts"].tolist() == starts
    assert (batch["num_tokens"], batch["num_trained"]) == (9, 5)
    with_sources = rows.lay_out(rows.rows, with_sources=True)
    assert [rows.names[n] for n in with_sources["sources"][0, :6].tolist()] == ["SmolTalk"] * 6
    assert [rows.names[n] for n in with_sources["sources"][1, :3].tolist()] == ["GSM8K"] * 3


def test_the_widest_batch_has_room_for_all_documents():
    rows = ConversationRows(make_conversations([2] * 40 + [10]), length=10, batch_size=2, pad_token_id=0, fixed=True)
    shapes = {tuple(rows.lay_out(rows.rows[n : n + 2])["document_starts"].shape) for n in range(0, len(rows.rows), 2)}
    assert len(shapes) == 1
    for n in range(0, len(rows.rows), 2):
        starts = rows.lay_out(rows.rows[n : n + 2])["document_starts"]
        assert starts.diff().min() >= 0
        assert starts.diff().max() <= 10
        assert starts[-1] == 20


def test_unpacked_rows_keep_the_order_of_the_data():
    rows = ConversationRows(make_conversations([3, 2, 4]), length=6, batch_size=2, pad_token_id=0, packed=False)
    assert rows.rows == [[0], [1], [2]]
    assert rows.collate([{"row": 0}, {"row": 1}])["input_ids"].tolist() == [[100, 101, 102], [200, 201, 0]]


def test_a_stream_is_cut_where_rows_end():
    rows = StreamRows(make_conversations([4, 3, 2, 6]), length=3, batch_size=2)
    assert rows.rows == [0, 3, 7, 10]  # a micro-batch reads seven tokens: two rows of three, and the label of the last
    batch = rows.collate([{"row": 0}, {"row": 1}])
    assert batch["input_ids"].tolist() == [[100, 101, 102], [103, 200, 201]]
    assert batch["shift_labels"].tolist() == [[-100, 102, 103], [-100, 201, 202]]
    assert batch["position_ids"].tolist() == [[0, 1, 2]] * 2
    assert batch["document_starts"].tolist() == [0, 3, 6]
    assert (batch["num_tokens"], batch["num_trained"]) == (6, 4)
    assert rows.collate([{"row": 2}, {"row": 3}])["input_ids"].tolist() == [[300, 301, 400], [401, 402, 403]]
    with pytest.raises(UserError, match="15 tokens, and a micro-batch of 5 rows takes 16"):
        StreamRows(make_conversations([4, 3, 2, 6]), length=3, batch_size=5)

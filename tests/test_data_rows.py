"""The rows that a model sees: shapes, labels, ranks, resuming, validation."""

import copy
import json
from itertools import chain, islice

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from chatmodel.data.loading import read_ahead
from chatmodel.data.rows import PACKINGS, PackedRows, find_document_starts, validation_rows
from chatmodel.data.store import TokenStore
from chatmodel.runtime import UserError, warn_once

BOS = 999


@pytest.fixture
def make_store(tmp_path):
    """Documents whose tokens are all different: document i begins with BOS and goes on with i * 100 + 1, ..."""

    def make(lengths: list[int], dtype=np.uint16) -> TokenStore:
        documents = [
            [BOS, *(1_000 + number * 100 + n for n in range(1, length))] for number, length in enumerate(lengths)
        ]
        folder = tmp_path / "a-store"
        folder.mkdir(exist_ok=True)
        tokens = np.array(list(chain(*documents)), dtype=dtype)
        tokens.tofile(folder / "tokens.bin")
        return TokenStore(folder, {}, tokens, np.cumsum([0, *lengths]))

    return make


@pytest.fixture
def store(make_store) -> TokenStore:
    return make_store(np.random.default_rng(0).integers(2, 40, size=80).tolist())


def take_rows(rows: PackedRows, number: int) -> list[dict[str, torch.Tensor]]:
    iterator = iter(rows)
    return [next(iterator) for _ in range(number)]


def as_lists(rows) -> list[list[int]]:
    return [[*row["input_ids"].tolist(), row["shift_labels"][-1].item()] for row in rows]


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_shapes_and_labels(packing, dtype, make_store):
    store = make_store([9, 17, 30, 4, 12], dtype)
    for row in take_rows(PackedRows(store, sequence_length=16, packing=packing), 20):
        assert {name: (tensor.shape, tensor.dtype) for name, tensor in row.items()} == {
            "input_ids": ((16,), torch.int64),
            "shift_labels": ((16,), torch.int64),
        }
        assert torch.equal(row["input_ids"][1:], row["shift_labels"][:-1])
        assert int(row["shift_labels"].min()) >= 0


def test_best_fit_row_by_hand(make_store):
    # A row reads 8 tokens: the documents of 5 and 3, in this order, fill it.
    row = next(iter(PackedRows(make_store([3, 5]), sequence_length=7)))
    assert row["input_ids"].tolist() == [BOS, 1101, 1102, 1103, 1104, BOS, 1001]
    assert row["shift_labels"].tolist() == [1101, 1102, 1103, 1104, BOS, 1001, 1002]


def test_best_fit_rows_begin_with_a_document(store):
    rows = take_rows(PackedRows(store, sequence_length=31, packing="best_fit"), 100)
    assert all(row["input_ids"][0] == BOS for row in rows)


def test_contiguous_rows_are_the_store(store):
    rows = PackedRows(store, sequence_length=16, packing="contiguous", epochs=1)
    text = "".join(f" {token}" for token in store.tokens)
    lists = as_lists(rows)
    assert len(lists) == (store.num_tokens - 1) // 16
    assert all("".join(f" {token}" for token in row) in text for row in lists)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_rows_of_one(store, packing, world_size):
    options = {"sequence_length": 16, "packing": packing, "epochs": 1}
    whole = as_lists(PackedRows(store, **options))
    ranks = [as_lists(PackedRows(store, rank=r, world_size=world_size, **options)) for r in range(world_size)]
    assert {len(rows) for rows in ranks} == {len(whole) // world_size}
    for rank, rows in enumerate(ranks):
        assert rows == whole[rank::world_size][: len(rows)]
    texts = [token for rows in ranks for row in rows for token in row[:-1] if token != BOS]
    assert len(set(texts)) == len(texts)  # no token is an input twice


@pytest.mark.parametrize("packing", PACKINGS)
def test_resuming_is_exact_at_every_row(store, packing):
    options = {"sequence_length": 24, "packing": packing, "rank": 1, "world_size": 2, "seed": 7, "buffer_documents": 9}
    uninterrupted = PackedRows(store, **options)
    iterator = iter(uninterrupted)
    states, rows = [], []
    for _ in range(80):  # more than one epoch
        states.append(json.dumps(uninterrupted.state_dict()))
        rows.append(next(iterator))
    assert uninterrupted.epoch >= 1
    expected = as_lists(rows)
    for number, state in enumerate(states):
        resumed = PackedRows(store, **options)
        resumed.load_state_dict(json.loads(state))
        assert as_lists(take_rows(resumed, 80 - number)) == expected[number:]


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_state_holds_for_another_number_of_ranks(store, packing):
    options = {"sequence_length": 24, "packing": packing}
    expected = as_lists(take_rows(PackedRows(store, **options), 24))
    pair = [PackedRows(store, rank=rank, world_size=2, **options) for rank in range(2)]
    states = [take_rows(rows, 6) and rows.state_dict() for rows in pair]
    assert states[0] == states[1]
    four = [PackedRows(store, rank=rank, world_size=4, **options) for rank in range(4)]
    for rows in four:
        rows.load_state_dict(copy.deepcopy(states[0]))
    given = [as_lists(take_rows(rows, 3)) for rows in four]
    assert [given[n % 4][n // 4] for n in range(12)] == expected[12:]


def test_state_is_a_copy_and_small(make_store):
    store = make_store([2] * 5_000, np.uint32)
    rows = PackedRows(store, sequence_length=3)
    iterator = iter(rows)
    next(iterator)
    state = rows.state_dict()
    before = json.dumps(state)
    next(iterator)
    assert json.dumps(state) == before
    assert len(before) < 20_000  # a thousand spans


@pytest.mark.parametrize("packing", PACKINGS)
def test_under_a_data_loader(store, packing):
    expected = take_rows(PackedRows(store, sequence_length=16, packing=packing), 8)
    rows = PackedRows(store, sequence_length=16, packing=packing)
    loader = iter(DataLoader(rows, batch_size=4))
    batch = next(loader)
    assert batch["input_ids"].shape == batch["shift_labels"].shape == (4, 16)
    assert torch.equal(batch["input_ids"], torch.stack([row["input_ids"] for row in expected[:4]]))
    # Nothing is read ahead: the state is that behind the batch, and a new loader goes on there.
    resumed = PackedRows(store, sequence_length=16, packing=packing)
    resumed.load_state_dict(rows.state_dict())
    single = next(iter(DataLoader(resumed, batch_size=None)))
    assert torch.equal(single["input_ids"], expected[4]["input_ids"])
    assert torch.equal(next(iter(DataLoader(rows, batch_size=1)))["input_ids"][0], expected[4]["input_ids"])


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_batches_are_the_rows(make_store, packing, dtype):
    store = make_store([9, 17, 30, 4, 12, 25], dtype)
    options = {"sequence_length": 16, "packing": packing, "rank": 1, "world_size": 2, "epochs": 3}
    rows = list(PackedRows(store, **options))
    assert len(rows) >= 5
    batches = [batch for batch, _ in PackedRows(store, **options).batches(4)]
    assert [len(batch["input_ids"]) for batch in batches] == [4] * (len(rows) // 4) + [len(rows) % 4] * (
        len(rows) % 4 > 0
    )
    for name in ("input_ids", "shift_labels"):
        joined = torch.cat([batch[name] for batch in batches])
        assert torch.equal(joined, torch.stack([row[name] for row in rows]))
        assert joined.dtype == torch.int64
        assert all(batch[name].is_contiguous() for batch in batches)
    with pytest.raises(UserError, match="a batch of 0 rows"):
        next(PackedRows(store, **options).batches(0))


@pytest.mark.parametrize("packing", PACKINGS)
def test_the_state_is_that_of_the_batch_however_far_the_thread_is(store, packing):
    options = {"sequence_length": 16, "packing": packing}
    expected = [batch["input_ids"] for batch, _ in islice(PackedRows(store, **options).batches(2), 20)]
    ahead = read_ahead(PackedRows(store, **options).batches(2), source="a store", depth=5)
    for number, (batch, state) in enumerate(islice(ahead, 10)):
        assert torch.equal(batch["input_ids"], expected[number])
        resumed = PackedRows(store, **options)
        resumed.load_state_dict(json.loads(json.dumps(state)))
        following, _ = next(resumed.batches(2))
        assert torch.equal(following["input_ids"], expected[number + 1])
    ahead.close()


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("seed", range(6))
def test_any_stops_and_any_numbers_of_ranks_give_the_same_rows(make_store, packing, seed):
    """A run that is stopped and continued again and again, each time on another number of ranks."""
    draw = np.random.default_rng(seed)
    store = make_store(draw.integers(2, 60, size=int(draw.integers(20, 60))).tolist())
    options = {
        "sequence_length": int(draw.integers(8, 40)),
        "packing": packing,
        "seed": seed,
        "buffer_documents": int(draw.integers(1, 30)),
    }
    given: list[list[int]] = []
    state = PackedRows(store, **options).state_dict()
    for _ in range(8):
        world_size, steps, batch_size = (int(draw.integers(1, 5)) for _ in range(3))
        ranks = [PackedRows(store, rank=rank, world_size=world_size, **options) for rank in range(world_size)]
        for rows in ranks:
            rows.load_state_dict(json.loads(json.dumps(state)))
        taken = [list(islice(rows.batches(batch_size), steps)) for rows in ranks]
        states = [batches[-1][1] for batches in taken]
        assert all(other == states[0] for other in states)
        state = states[0]
        by_rank = [
            as_lists({name: batch[name][n] for name in batch} for batch, _ in batches for n in range(batch_size))
            for batches in taken
        ]
        given += [by_rank[n % world_size][n // world_size] for n in range(world_size * steps * batch_size)]
    assert given == as_lists(take_rows(PackedRows(store, **options), len(given)))


def test_refusals(store, make_store):
    with pytest.raises(UserError, match=r"sequence_length 16 is longer than the data: .*a-store holds only 16 tokens"):
        PackedRows(make_store([16]), sequence_length=16)
    PackedRows(make_store([17]), sequence_length=16)
    with pytest.raises(UserError, match="sequence_length is 0"):
        PackedRows(store, sequence_length=0)
    with pytest.raises(UserError, match="packing 'tight' is unknown; choose best_fit, best_fit_whole or contiguous"):
        PackedRows(store, sequence_length=16, packing="tight")
    rows = PackedRows(store, sequence_length=16)
    for name, value in (("packing", "contiguous"), ("sequence_length", 32)):
        with pytest.raises(UserError, match=f"made with {name} {value}, now it is"):
            rows.load_state_dict(rows.state_dict() | {name: value})


def test_validation_rows_by_hand(make_store):
    store = make_store([4, 3])  # BOS 1001 1002 1003 BOS 1101 1102
    rows = list(validation_rows(store, sequence_length=4))
    assert [row["input_ids"].tolist() for row in rows] == [[BOS, 1001, 1002, 1003], [BOS, 1101, 0, 0]]
    assert [row["shift_labels"].tolist() for row in rows] == [[1001, 1002, 1003, BOS], [1101, 1102, -100, -100]]
    assert rows[0]["input_ids"].dtype == rows[0]["shift_labels"].dtype == torch.int64


@pytest.mark.parametrize(("max_tokens", "expected"), [(None, 6), (100, 6), (6, 6), (5, 5), (4, 4), (1, 1)])
def test_validation_labels_are_counted(max_tokens, expected, make_store):
    rows = list(validation_rows(make_store([4, 3]), sequence_length=4, max_tokens=max_tokens))
    labels = torch.cat([row["shift_labels"] for row in rows])
    assert int((labels >= 0).sum()) == expected
    assert len(labels) == -(-expected // 4) * 4


def test_validation_positions_restart_at_each_document(make_store):
    """Documents of 3, 6 and 2 tokens in rows of 4; the first row has no room for more than one of document 1."""
    rows = list(validation_rows(make_store([3, 6, 2]), sequence_length=4, documents_apart=True))
    assert [row["position_ids"].tolist() for row in rows] == [[0, 1, 2, 0], [0, 1, 2, 3], [0, 0, 1, 0]]
    assert rows[2]["shift_labels"].tolist() == [BOS, 1201, -100, -100]
    assert "position_ids" not in next(validation_rows(make_store([3, 6, 2]), sequence_length=4))


def test_validation_shorter_than_a_row(make_store):
    (row,) = validation_rows(make_store([3]), sequence_length=8)
    assert row["shift_labels"].tolist() == [1001, 1002] + [-100] * 6
    with pytest.raises(UserError, match="sequence_length is -1"):
        next(validation_rows(make_store([3]), sequence_length=-1))


def test_document_starts_by_hand():
    """Documents of 3, 10, 4 and 5 tokens in rows of 8 and the label behind them."""
    offsets = np.array([0, 3, 13, 17, 22])
    # Row 1: document 0, the first 6 of document 1. Row 2: the rest of document 1 (4), document 2 (4), one token of 3,
    # which is a label only.
    rows = [[(0, 3), (3, 9)], [(9, 13), (13, 17), (17, 18)]]
    starts = find_document_starts(rows, offsets, length=8, capacity=6)
    assert starts.dtype == np.int32
    assert starts.tolist() == [0, 3, 8, 12, 16, 16, 16]
    # Contiguous rows run over the ends of documents.
    assert find_document_starts([[(1, 10)]], offsets, length=8, capacity=3).tolist() == [0, 2, 8, 8]
    assert find_document_starts([[(10, 19)]], offsets, length=8, capacity=3).tolist() == [0, 3, 7, 8]


def test_too_little_room_for_documents(caplog):
    """Starts within rows are left out, never those of rows, and it is said once."""
    offsets = np.array([0, 3, 13, 17, 22])
    rows = [[(0, 3), (3, 9)], [(9, 13), (13, 17), (17, 18)]]
    warn_once.cache_clear()
    assert find_document_starts(rows, offsets, length=8, capacity=4).tolist() == [0, 3, 8, 12, 16]
    assert not caplog.text
    assert find_document_starts(rows, offsets, length=8, capacity=3).tolist() == [0, 3, 8, 16]
    assert find_document_starts(rows, offsets, length=8, capacity=2).tolist() == [0, 8, 16]
    assert caplog.text.count("the last of them are not kept apart") == 1


@pytest.mark.parametrize("batch_size", [1, 4, 32])
@pytest.mark.parametrize("packing", PACKINGS)
def test_no_start_of_a_document_is_left_out(make_store, packing, batch_size, monkeypatch):
    """However few rows a device holds at once; lengths differ by a factor of a hundred, as those of a text do."""
    monkeypatch.setattr("chatmodel.data.rows.SAMPLED_ROWS", 1_000)
    lengths = np.exp(np.random.default_rng(0).normal(3, 1.5, 3_000)).astype(int) + 2
    store = make_store(lengths.tolist(), np.uint32)
    rows = PackedRows(store, sequence_length=128, packing=packing, documents_apart=True)
    batches = rows.batches(batch_size)
    shapes = set()
    for _ in range(3_000 // batch_size):
        batch, _ = next(batches)
        shapes.add(batch["document_starts"].shape)
        begun = (batch["input_ids"] == BOS).flatten().nonzero().flatten()
        assert torch.isin(begun, batch["document_starts"]).all()
    assert len(shapes) == 1


@pytest.mark.parametrize("packing", PACKINGS)
def test_batches_with_document_starts(store, packing):
    """The starts are where <|bos|> stands or a row begins; and where what was cropped goes on, if it is kept."""
    rows = PackedRows(store, sequence_length=31, packing=packing, documents_apart=True)
    batch, _ = next(rows.batches(4))
    plain, _ = next(PackedRows(store, sequence_length=31, packing=packing).batches(4))
    assert torch.equal(batch["input_ids"], plain["input_ids"])
    assert batch["document_starts"].shape == (rows.document_capacity(4) + 1,)
    begins = batch["input_ids"] == BOS
    begins[:, 0] = True
    expected = begins.flatten().nonzero().flatten().tolist()
    found = batch["document_starts"].tolist()
    if packing == "best_fit_whole":
        assert set(expected) <= set(found)
    else:
        assert found == expected + [4 * 31] * (len(found) - len(expected))

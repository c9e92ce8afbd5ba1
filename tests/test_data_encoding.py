"""Encoding on all cores: tiktoken's ids, in order, the same from threads and processes, and no worker left over."""

import multiprocessing
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from chatmodel import workers
from chatmodel.data.encoding import Encoder, Piece, cut_shards, cut_texts, encode_in_order, open_workers
from chatmodel.data.files import DamagedFile
from chatmodel.data.shards import BadShard, find_file_shards
from chatmodel.runtime import UserError

linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there are threads only")
TEXTS = ["one text", "Zweites, mit Umlauten: äöü 文字", "a lone \ud800 surrogate", "  spaces  \r\n\n and 12345"]


def test_ids_are_tiktokens(tokenizer):
    encoder = Encoder(tokenizer)
    block = encoder.encode([*TEXTS, "", "<|bos|>"])
    expected = encoder.encoding.encode_ordinary_batch([*TEXTS, "<|bos|>"])
    assert block.tokens.tolist() == [token for ids in expected for token in (tokenizer.bos_token_id, *ids)]
    assert block.lengths.tolist() == [len(ids) + 1 for ids in expected]
    assert block.sizes.tolist() == [len(encoder.encoding.decode_bytes(ids)) for ids in expected]
    nothing = encoder.encode([])
    assert (len(nothing.tokens), len(nothing.lengths), nothing.tokens.dtype) == (0, 0, block.tokens.dtype)


def test_texts_are_cut_into_batches(monkeypatch):
    monkeypatch.setattr("chatmodel.data.encoding.BATCH_CHARS", 5)
    assert list(cut_texts(["abc", "de", "f", "ghijklm", "n"])) == [["abc", "de"], ["f", "ghijklm"], ["n"]]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A parquet shard of five row groups, a jsonl shard, and one more for validation."""
    monkeypatch.setattr("chatmodel.data.files.PIECE_BYTES", 1)
    monkeypatch.setattr("chatmodel.data.encoding.BATCH_CHARS", 100)
    root = tmp_path / "text"
    root.mkdir()
    texts = [None if n == 7 else "" if n == 8 else f"document {n} " + "word " * (n % 13) for n in range(100)]
    pq.write_table(pa.table({"text": texts}), root / "a.parquet", row_group_size=20)
    (root / "b.jsonl").write_text("".join(f'{{"text": "line {n} of b"}}\n' for n in range(50)))
    (root / "c.jsonl").write_text('{"text": "for validation"}')
    return root


def encode_folder(folder: Path, encoder: Encoder, **options) -> tuple[list[int], list[int]]:
    """All tokens, and the position of each piece."""
    shards = find_file_shards(str(folder), "train", text_column="text")
    tokens: list[int] = []
    positions: list[int] = []
    with open_workers(encoder, **options) as (submit, number):
        pieces = cut_shards(shards, first=0, read=lambda number, digest: None)
        for piece, block in encode_in_order(pieces, submit, num_workers=number):
            tokens += block.tokens.tolist()
            positions.append(piece.position)
    return tokens, positions


def test_threads_and_processes_give_the_same_in_order(folder, tokenizer):
    encoder = Encoder(tokenizer)
    texts = list(find_file_shards(str(folder), "train", text_column="text").read())
    assert len(texts) == 148
    expected = encoder.encode(texts).tokens.tolist()
    for number, total in ((1, 0), (3, 0), (3, 10**9)):  # the last ones are processes, on Linux
        tokens, positions = encode_folder(folder, encoder, num_workers=number, total_bytes=total)
        assert tokens == expected
        assert positions == sorted(positions)
        assert len(positions) > 10


def test_results_before_a_bad_shard_are_given(tokenizer):
    def pieces():
        for n in range(9):
            yield Piece([f"piece {n}"], shard=0)
        raise BadShard(1, DamagedFile("bad"))

    with open_workers(Encoder(tokenizer), num_workers=2, total_bytes=0) as (submit, number):
        results = encode_in_order(pieces(), submit, num_workers=number)
        assert [next(results)[0].texts for _ in range(9)] == [[f"piece {n}"] for n in range(9)]
        with pytest.raises(BadShard):
            next(results)


def encode_with_a_killed_worker(encoder: Encoder) -> None:
    with open_workers(encoder, num_workers=2, total_bytes=10**9) as (submit, _):
        workers = psutil.Process().children()
        assert len(workers) == 2
        workers[0].kill()
        for _ in range(100):
            submit(Piece(["some text"])).result()
            time.sleep(0.05)


@linux
def test_a_killed_worker_is_an_error(tokenizer):
    with pytest.raises(UserError, match="was killed from outside"):
        encode_with_a_killed_worker(Encoder(tokenizer))


def hold_workers(encoder: Encoder, ready: Connection) -> None:
    workers.PARENT_CHECK_SECONDS = 0.1
    with open_workers(encoder, num_workers=2, total_bytes=10**9):
        ready.send([child.pid for child in psutil.Process().children()])
        time.sleep(60)


@linux
def test_workers_end_with_a_killed_parent(tokenizer):
    """A process that is killed cannot tell its workers; they look for it by themselves."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe()
    parent = context.Process(target=hold_workers, args=(Encoder(tokenizer), sender))
    parent.start()
    children = [psutil.Process(pid) for pid in receiver.recv()]
    assert len(children) == 2
    parent.kill()
    parent.join()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive

"""How is text turned into ids on all cores, in the order of the documents?"""

import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from chatmodel.data.files import DamagedFile, plan_row_groups, read_parquet, read_texts
from chatmodel.data.loading import read_ahead
from chatmodel.data.shards import BadShard, Selection, Shards, fetch_in_turn
from chatmodel.tokenizer import build_encoding
from chatmodel.workers import count_cores, open_processes, run_in_order

BATCH_CHARS = 200_000  # text that goes to a worker at a time, where this process reads it
MAX_WORKERS = 32  # one process writes what all of them encode
MIN_PROCESS_BYTES = 10_000_000  # of files; for less text, processes cost more than they save


@dataclass(frozen=True)
class Block:
    """Some documents as ids, each beginning with `<|bos|>`.

    tokens: (n,) uint16 or uint32. lengths: (documents,) tokens of each. sizes: (documents,) UTF-8 bytes of its text.
    """

    tokens: NDArray[Any]
    lengths: NDArray[np.int64]
    sizes: NDArray[np.int64]


@dataclass(frozen=True)
class RowGroups:
    """Rows of a parquet file, which the worker reads itself, so that text crosses no border between processes."""

    file: Path
    numbers: list[int]
    selection: Selection

    def __iter__(self) -> Iterator[str]:
        texts = read_parquet(self.file, self.selection.text_column, self.numbers)
        return (text for text in texts if self.selection.keeps(text))


@dataclass(frozen=True)
class Piece:
    """What a worker encodes at a time.

    shard: number of the file it is from. position: bytes of all files up to its end, roughly; for the progress bar.
    """

    texts: list[str] | RowGroups
    shard: int = 0
    position: int = 0


class Encoder:
    """Turns texts into ids; control tokens in them are read as text."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.encoding = build_encoding(tokenizer)
        self.dtype = np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)
        self.bos = np.array([tokenizer.bos_token_id], dtype=np.uint32)

    def encode(self, texts: Iterable[str]) -> Block:
        """The ids of each text that is not empty."""
        parts = [self.bos[:0]]
        lengths: list[int] = []
        sizes: list[int] = []
        for text in texts:
            if not text:
                continue
            ids = self._encode_text(text)
            parts += [self.bos, ids]
            lengths.append(len(ids) + 1)
            sizes.append(len(text.encode("utf-8", "surrogatepass")))
        tokens = np.concatenate(parts, dtype=self.dtype, casting="unsafe")
        return Block(tokens, np.array(lengths, dtype=np.int64), np.array(sizes, dtype=np.int64))

    def _encode_text(self, text: str) -> NDArray[np.uint32]:
        try:
            # Unlike encode_ordinary it makes no Python list, which takes a third of the time.
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:  # a lone surrogate: encode_ordinary replaces it by U+FFFD, as long in bytes
            return np.array(self.encoding.encode_ordinary(text), dtype=np.uint32)

    def count_bytes(self, ids: NDArray[Any]) -> int:
        """The UTF-8 bytes that ids stand for."""
        return len(self.encoding.decode_bytes(ids.tolist()))


Submit = Callable[[Piece], "Future[Block]"]


@contextmanager
def open_workers(encoder: Encoder, *, num_workers: int | None, total_bytes: int) -> Iterator[tuple[Submit, int]]:
    """Workers that encode pieces, and their number; they are gone afterwards.

    They are processes where the system forks them, a third faster than threads. Elsewhere and for less than
    `MIN_PROCESS_BYTES` they are threads, as tiktoken frees the interpreter lock.

    Args:
        num_workers: by default as many as there are cores.

    Raises:
        UserError: a process was killed from outside.
    """
    number = num_workers or min(count_cores(), MAX_WORKERS)

    def encode(piece: Piece) -> Block:
        return encoder.encode(piece.texts)

    if number == 1 or total_bytes < MIN_PROCESS_BYTES or sys.platform != "linux":
        pool = ThreadPoolExecutor(number)
        try:
            yield lambda piece: pool.submit(encode, piece), number
        finally:
            pool.shutdown(cancel_futures=True)
    else:
        with open_processes(encode, number, doing="encodes text") as submit:
            yield submit, number


def encode_in_order(pieces: Iterator[Piece], submit: Submit, *, num_workers: int) -> Iterator[tuple[Piece, Block]]:
    """Encode pieces side by side, and give the results in the order of the pieces.

    Raises:
        BadShard: after the results of all pieces before the one that cannot be read.
    """
    for piece, future in run_in_order(pieces, submit, ahead=2 * num_workers):
        try:
            block = future.result()
        except DamagedFile as error:
            raise BadShard(piece.shard, error) from None
        yield piece, block


def cut_texts(documents: Iterable[str], *, num_chars: int | None = None) -> Iterator[list[str]]:
    """Documents in lists of about `num_chars` characters, by default `BATCH_CHARS`."""
    limit = BATCH_CHARS if num_chars is None else num_chars
    batch: list[str] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= limit:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def cut_shards(shards: Shards, *, first: int, read: Callable[[int, str], None]) -> Iterator[Piece]:
    """The pieces of a split's files, from number `first` on.

    Args:
        read: is told number and sha256 of each file before its first piece is given.

    Raises:
        BadShard: a file cannot be read.
    """
    before = sum(shard.size for shard in shards.files[:first])
    fetched = read_ahead(fetch_in_turn(shards.files, first=first), source="files", timeout=None, depth=1)
    for number, path, digest in fetched:
        read(number, digest)
        size = shards.files[number].size
        try:
            for texts, share in cut_file(path, shards.selection, size=size):
                yield Piece(texts, number, before + int(share * size))
        except DamagedFile as error:
            raise BadShard(number, error) from None
        before += size


def cut_file(path: Path, selection: Selection, *, size: int) -> Iterator[tuple[list[str] | RowGroups, float]]:
    """The pieces of a file, and the share of the file up to the end of each."""
    runs = plan_row_groups(path, selection.text_column) if path.suffix == ".parquet" else None
    if runs is not None:
        for number, run in enumerate(runs, start=1):
            yield RowGroups(path, run, selection), number / len(runs)
        return
    seen = 0
    texts = (text for text in read_texts(path, text_column=selection.text_column) if selection.keeps(text))
    for batch in cut_texts(texts):
        seen += sum(map(len, batch))
        yield batch, min(1.0, seen / size)

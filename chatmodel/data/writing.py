"""How are encoded documents written, so that the store can be traced to its sources and a bad one taken back?"""

import hashlib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from chatmodel.data.encoding import Block, Encoder, Piece, cut_shards, cut_texts, encode_in_order, open_workers
from chatmodel.data.shards import BadShard, Quarantine, Shards

TOKENS_FILE = "tokens.bin"
OFFSETS_FILE = "offsets.bin"


@dataclass(frozen=True)
class Mark:
    """A place in what was written, to which it can be taken back."""

    num_tokens: int
    num_bytes: int
    num_blocks: int
    digest: Any


class TokenWriter:
    """Appends documents to the two files of a store, and counts and hashes what it writes."""

    def __init__(self, folder: Path, encoder: Encoder, *, max_tokens: int | None) -> None:
        self.folder = folder
        self.encoder = encoder
        self.max_tokens = sys.maxsize if max_tokens is None else max_tokens
        self.lengths: list[NDArray[np.int64]] = []
        self.num_tokens = 0
        self.num_bytes = 0
        self.digest = hashlib.sha256()
        self.file = (folder / TOKENS_FILE).open("wb")

    def append(self, block: Block) -> bool:
        """Write some documents; False when the store is full then."""
        room = self.max_tokens - self.num_tokens
        if len(block.tokens) > room:
            block = self._cut(block, room)
            room = len(block.tokens)
        self.digest.update(block.tokens.data)
        self.file.write(block.tokens.data)
        self.lengths.append(block.lengths)
        self.num_tokens += len(block.tokens)
        self.num_bytes += int(block.sizes.sum())
        return len(block.tokens) < room

    def _cut(self, block: Block, room: int) -> Block:
        """The first documents, the last of them cut, that have `room` tokens at most."""
        stops = np.cumsum(block.lengths)
        whole = int(np.searchsorted(stops, room, side="right"))
        start = int(stops[whole - 1]) if whole else 0
        if room - start < 2:  # a lone <|bos|> says nothing
            return Block(block.tokens[:start], block.lengths[:whole], block.sizes[:whole])
        rest = block.tokens[start:room]
        size = self.encoder.count_bytes(rest[1:])
        return Block(
            block.tokens[:room], np.append(block.lengths[:whole], len(rest)), np.append(block.sizes[:whole], size)
        )

    def mark(self) -> Mark:
        """Where the store stands now."""
        return Mark(self.num_tokens, self.num_bytes, len(self.lengths), self.digest.copy())

    def take_back(self, mark: Mark) -> None:
        """Forget what was written since."""
        self.num_tokens, self.num_bytes, self.digest = mark.num_tokens, mark.num_bytes, mark.digest
        del self.lengths[mark.num_blocks :]
        self.file.seek(mark.num_tokens * self.encoder.dtype.itemsize)
        self.file.truncate()

    def finish(self) -> dict[str, Any]:
        """Write the offsets; returns what the manifest says of the files."""
        self.file.close()
        lengths = np.concatenate([np.zeros(1, dtype=np.int64), *self.lengths])
        np.cumsum(lengths).tofile(self.folder / OFFSETS_FILE)
        return {
            "documents": len(lengths) - 1,
            "tokens": self.num_tokens,
            "bytes": self.num_bytes,
            "dtype": self.encoder.dtype.name,
            "sha256": self.digest.hexdigest(),
        }


class BuildProgress:
    """The bar of a build: megabytes of text, speed, and time left by the share of files or of tokens that is done."""

    def __init__(self, split: str, *, total_bytes: int, writer: TokenWriter) -> None:
        self.bar = tqdm(desc=f"tokens, {split}", unit="B", unit_scale=True, disable=None)
        self.total_bytes = total_bytes
        self.writer = writer

    def show(self, position: int) -> None:
        """Say how far the build is, after `position` bytes of the files."""
        writer = self.writer
        done = max(position / max(1, self.total_bytes), writer.num_tokens / writer.max_tokens)
        if done > 0.001:
            self.bar.total = int(writer.num_bytes / min(1.0, done))
        self.bar.update(writer.num_bytes - self.bar.n)


def write_texts(documents: Iterable[str], writer: TokenWriter, *, split: str, num_workers: int | None) -> bool:
    """Write documents in their order until they end or the store is full; whether they ended."""
    progress = BuildProgress(split, total_bytes=0, writer=writer)
    with progress.bar, open_workers(writer.encoder, num_workers=num_workers, total_bytes=0) as (submit, number):
        pieces = (Piece(texts) for texts in cut_texts(documents))
        for _, block in encode_in_order(pieces, submit, num_workers=number):
            more = writer.append(block)
            progress.show(0)
            if not more:
                return False
    return True


@dataclass
class ShardsWriter:
    """Writes a split's files, takes back what came from a bad one, and keeps account of the files.

    digests: sha256 of each file that was opened. written: the files whose documents are in the store, in order.
    """

    shards: Shards
    writer: TokenWriter
    quarantine: Quarantine
    split: str
    num_workers: int | None = None
    digests: dict[int, str] = field(default_factory=dict, init=False)
    written: list[int] = field(default_factory=list, init=False)
    marks: dict[int, Mark] = field(default_factory=dict, init=False)  # of the file that is being written

    @property
    def sources(self) -> list[dict[str, Any]]:
        """Name, bytes and sha256 of each file that was read to its end, or to where the store was full."""
        files = self.shards.files
        return [{"name": files[n].name, "bytes": files[n].size, "sha256": self.digests[n]} for n in self.written]

    def write(self) -> bool:
        """Write the documents in their order until they end or the store is full; whether they ended.

        Raises:
            DamagedFile: a file is bad, and the policy is to stop.
        """
        total_bytes = sum(shard.size for shard in self.shards.files)
        progress = BuildProgress(self.split, total_bytes=total_bytes, writer=self.writer)
        workers = open_workers(self.writer.encoder, num_workers=self.num_workers, total_bytes=total_bytes)
        first = 0
        with progress.bar, workers as (submit, number):
            while first < len(self.shards.files):
                pieces = cut_shards(self.shards, first=first, read=self.digests.__setitem__)
                try:
                    return self._write_blocks(encode_in_order(pieces, submit, num_workers=number), progress)
                except BadShard as bad:
                    self._take_back(bad.number)
                    again = self.quarantine.admit(self.shards.files[bad.number], bad.error)
                    first = bad.number + (0 if again else 1)
        return True

    def _write_blocks(self, blocks: Iterator[tuple[Piece, Block]], progress: BuildProgress) -> bool:
        for piece, block in blocks:
            if piece.shard not in self.marks:
                self.written.append(piece.shard)
                self.marks = {piece.shard: self.writer.mark()}
            more = self.writer.append(block)
            progress.show(piece.position)
            if not more:
                return False
        return True

    def _take_back(self, number: int) -> None:
        """Forget what was written of a file."""
        if number in self.marks:
            self.writer.take_back(self.marks.pop(number))
            self.written.remove(number)

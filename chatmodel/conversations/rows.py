"""How do the conversations of a mixture become rows of ids and labels, on all cores, and what is lost on the way?"""

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from datasets import Features, List, Value
from tqdm import tqdm

from chatmodel.conversations.render import Piece, Rendered, lay_out, render_pieces
from chatmodel.conversations.sources import Source, StreamFailure
from chatmodel.runtime import UserError
from chatmodel.workers import count_cores, open_processes, run_in_order

logger = logging.getLogger("chatmodel")

CHUNK_ROWS = 1024
PARALLEL_ROWS = 8 * CHUNK_ROWS  # from which on processes are worth their start
SKIPPED_NAMED = 3
FEATURES = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32")), "source": Value("string")})
COUNTS = ("rows", "tokens", "trained_tokens", "skipped", "cut", "dropped")

Place = tuple[int, int]  # the number of a mixture's member, and of one of its rows


@dataclass
class Member:
    """A source in a mixture, what becomes of its rows that are too long, and how many were read so far."""

    source: Source
    too_long: str = "cut"
    taken: int = 0


@dataclass
class Tally:
    """What became of the rows of a member so far."""

    name: str
    counts: dict[str, Any] = field(init=False)
    skipped: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.counts = {"name": self.name} | dict.fromkeys(COUNTS, 0)

    def skip(self, problem: str) -> None:
        """Count a row that is invalid; the first ones are named later."""
        self.counts["skipped"] += 1
        if len(self.skipped) < SKIPPED_NAMED:
            self.skipped.append(problem)

    def admit(self, row: Rendered, trained_tokens: int, too_long: str) -> bool:
        """Count a rendered row; whether it is trained on."""
        is_dropped = not trained_tokens or (row.cut > 0 and too_long == "drop")
        self.counts["cut"] += row.cut > 0 and not is_dropped
        self.counts["dropped"] += is_dropped
        if not is_dropped:
            self.counts["rows"] += 1
            self.counts["tokens"] += len(row.mask)
            self.counts["trained_tokens"] += trained_tokens
        return not is_dropped

    def add(self, later: "Tally") -> None:
        """Count what another one counted behind this one."""
        for key in COUNTS:
            self.counts[key] += later.counts[key]
        self.skipped = (self.skipped + later.skipped)[:SKIPPED_NAMED]

    def log_skipped(self) -> None:
        """Say how many rows were skipped, and the first of them by name."""
        count = self.counts["skipped"]
        if count:
            more = f"; and {count - len(self.skipped)} more" if count > len(self.skipped) else ""
            logger.warning(
                "%s: %d invalid conversations left out: %s%s", self.name, count, "; ".join(self.skipped), more
            )


class RowMaker:
    """Reads, renders and labels conversations; the arguments are those of `load_mixture`."""

    def __init__(
        self,
        members: Sequence[Member],
        tokenizer: Any,
        *,
        max_length: int,
        skip_invalid: bool = False,
        train_on_prompts: bool = False,
    ) -> None:
        self.members, self.tokenizer, self.max_length = members, tokenizer, max_length
        self.skip_invalid, self.train_on_prompts = skip_invalid, train_on_prompts

    def make(self, places: Sequence[Place]) -> tuple[pa.Table, list[Tally]]:
        """A table of the form `FEATURES`, and what was counted of each member.

        Raises:
            UserError: a conversation is invalid, and may not be skipped; or a stream broke off.
        """
        tallies = [Tally(member.source.name) for member in self.members]
        laid_out = [(number, self._read(number, row, tallies[number])) for number, row in places]
        kept = [(number, pieces) for number, pieces in laid_out if pieces is not None]
        rendered = render_pieces(self.tokenizer, [pieces for _, pieces in kept], max_length=self.max_length)
        columns: dict[str, list[Any]] = {name: [] for name in FEATURES}
        for (number, _), row in zip(kept, rendered, strict=True):
            member = self.members[number]
            mask = [1] * len(row.mask) if self.train_on_prompts else row.mask
            if tallies[number].admit(row, sum(mask), member.too_long):
                columns["input_ids"].append(row.input_ids)
                columns["labels"].append([i if t else -100 for i, t in zip(row.input_ids, mask, strict=True)])
                columns["source"].append(member.source.name)
        return pa.Table.from_pydict(columns, schema=FEATURES.arrow_schema), tallies

    def _read(self, number: int, row: int, tally: Tally) -> list[Piece] | None:
        """The conversation of a row, laid out; None where it is invalid and may be skipped."""
        member = self.members[number]
        source = member.source
        # A stream gives its rows as they come: its n-th place in the mixture gets its n-th row.
        row = (member.taken if source.is_stream else row) % source.count
        member.taken += 1
        try:
            return lay_out(source.read(row))
        except StreamFailure as error:
            raise UserError(f"{source.locate(row)}: {error}") from None
        except UserError as error:
            problem = f"{source.locate(row)}: {error}"
            if not self.skip_invalid:
                raise UserError(f"{problem} (skip_invalid leaves such rows out)") from None
            tally.skip(problem)
            return None


def make_rows(order: Sequence[Place], maker: RowMaker, tallies: Sequence[Tally]) -> Iterator[pa.Table]:
    """The rows of all places in their order, a table for some at a time; what is lost is counted in `tallies`.

    Many rows are made by forked processes, this one's share of the cores each a part, unless a source is a stream,
    which only one can read.

    Raises:
        UserError: as `RowMaker.make`.
    """
    chunks = [order[begin : begin + CHUNK_ROWS] for begin in range(0, len(order), CHUNK_ROWS)]
    with tqdm(total=len(order), desc="conversations", unit="row", unit_scale=True, disable=None) as progress:
        for chunk, (table, counted) in zip(chunks, _make_chunks(chunks, maker), strict=True):
            for tally, later in zip(tallies, counted, strict=True):
                tally.add(later)
            yield table
            progress.update(len(chunk))


def _make_chunks(chunks: Sequence[Sequence[Place]], maker: RowMaker) -> Iterator[tuple[pa.Table, list[Tally]]]:
    number = count_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    has_stream = any(member.source.is_stream for member in maker.members)
    if sys.platform != "linux" or has_stream or number < 2 or len(chunks) * CHUNK_ROWS <= PARALLEL_ROWS:
        yield from map(maker.make, chunks)
        return
    with open_processes(maker.make, number, doing="reads conversations") as submit:
        for _, future in run_in_order(chunks, submit, ahead=2 * number):
            yield future.result()

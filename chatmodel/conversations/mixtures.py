"""Which conversations a model is trained on, in what shares and order: a list of entries becomes a data set of ids."""

import atexit
import logging
import random
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value, concatenate_datasets
from datasets.arrow_writer import ArrowWriter
from tqdm import tqdm

from chatmodel.conversations.datasets import PUBLIC_TASKS
from chatmodel.conversations.generated import GENERATED_TASKS
from chatmodel.conversations.render import LEGEND, Piece, Rendered, lay_out, preview_masks, render_pieces
from chatmodel.conversations.sources import MixtureEntry, Source, StreamFailure, open_entry, parse_mixture
from chatmodel.runtime import UserError

logger = logging.getLogger("chatmodel")

CHUNK_ROWS = 1024
LARGE_MIXTURE = 100_000  # rows, from which on the ids are kept on the disk
SKIPPED_NAMED = 3
FEATURES = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32")), "source": Value("string")})
COUNTS = ("rows", "tokens", "trained_tokens", "skipped", "cut", "dropped")


def load_mixture(
    entries: Sequence[Any],
    tokenizer: Any,
    *,
    max_length: int,
    seed: int = 42,
    skip_invalid: bool = False,
    chatcore_folder: Path | None = None,
    words: Sequence[str] | None = None,
    split: str = "train",
    train_on_prompts: bool = False,
) -> tuple[Dataset, list[dict[str, Any]]]:
    """Rows of `input_ids`, `labels` (unshifted, -100 where not trained) and `source`, mixed; and counts per entry.

    Rows longer than `max_length` lose their end or are left out, as their entry says; one that loses all it would be
    trained on is left out, so that every row has a label after its first position. The order follows from `seed`
    alone. What was found is logged.

    Args:
        entries: what `parse_mixture` takes.
        skip_invalid: leave out (and count) conversations that cannot be read or rendered instead of raising.
        chatcore_folder: where files of public data sets are looked for before the Hub.
        words: for the word tasks without a `path`; the embedded list if None.
        split: for entries without one: "train", or "validation" for what each task holds out.
        train_on_prompts: label all ids, as nanochat's mid-training does, not only the assistant's.

    Returns:
        The data set (on the disk where it is large or streamed), and for each entry its `name`, `rows`, `tokens`,
        `trained_tokens`, `skipped` (invalid), `cut` (too long) and `dropped` (too long for a rule "drop", or nothing
        left to train on).

    Raises:
        UserError: an entry or a conversation is wrong; `DataAbsent` where data is missing.

    Source: karpathy/nanochat tasks/common.py@c75fe54, `TaskMixture`; the order is its order.
    """
    if max_length < 2:
        raise UserError(f"max_length is {max_length}; a row needs at least 2 tokens")
    parsed = parse_mixture(entries)
    options: dict[str, Any] = {"split": split, "folder": chatcore_folder, "words": words, "skip_invalid": skip_invalid}
    sources = [open_entry(entry, **options) for entry in parsed]
    order = mix_rows(count_rows(parsed, sources), seed=seed)
    tallies = [Tally(source, entry.too_long) for entry, source in zip(parsed, sources, strict=True)]
    chunks = _render_chunks(order, tallies, tokenizer, max_length, skip_invalid, train_on_prompts)
    on_disk = len(order) > LARGE_MIXTURE or any(source.is_stream for source in sources)
    dataset = _store_on_disk(chunks) if on_disk else _gather(chunks)
    counts = [tally.counts for tally in tallies]
    for tally in tallies:
        tally.log_skipped()
    if not len(dataset):
        raise UserError(_explain_nothing(counts, len(order), max_length))
    for line in describe_counts(counts):
        logger.info("%s%s", "" if split == "train" else f"{split}: ", line)
    for count in counts:
        if not count["rows"]:
            logger.warning("%s: none of its conversations can be trained on, see the counts above", count["name"])
    return dataset, counts


@dataclass
class Tally:
    """What became of the rows of a source so far."""

    source: Source
    too_long: str = "cut"
    counts: dict[str, Any] = field(init=False)
    skipped: list[str] = field(default_factory=list)
    taken: int = 0

    def __post_init__(self) -> None:
        self.counts = {"name": self.source.name} | dict.fromkeys(COUNTS, 0)

    def read(self, number: int, *, skip_invalid: bool) -> list[Piece] | None:
        """The conversation of a row, laid out; None where it is invalid and may be skipped."""
        # A stream gives its rows as they come: its n-th place in the mixture gets its n-th row.
        row = (self.taken if self.source.is_stream else number) % self.source.count
        self.taken += 1
        try:
            return lay_out(self.source.read(row))
        except StreamFailure as error:
            raise UserError(f"{self.source.locate(row)}: {error}") from None
        except UserError as error:
            problem = f"{self.source.locate(row)}: {error}"
            if not skip_invalid:
                raise UserError(f"{problem} (skip_invalid leaves such rows out)") from None
            self.counts["skipped"] += 1
            if len(self.skipped) < SKIPPED_NAMED:
                self.skipped.append(problem)
            return None

    def admit(self, row: Rendered, trained_tokens: int) -> bool:
        """Count a rendered row; whether it is trained on."""
        is_dropped = not trained_tokens or (row.cut > 0 and self.too_long == "drop")
        self.counts["cut"] += row.cut > 0 and self.too_long == "cut"
        self.counts["dropped"] += is_dropped
        if not is_dropped:
            self.counts["rows"] += 1
            self.counts["tokens"] += len(row.mask)
            self.counts["trained_tokens"] += trained_tokens
        return not is_dropped

    def log_skipped(self) -> None:
        """Say how many rows were skipped, and the first of them by name."""
        count = self.counts["skipped"]
        if count:
            more = f"; and {count - len(self.skipped)} more" if count > len(self.skipped) else ""
            logger.warning(
                "%s: %d invalid conversations left out: %s%s", self.source.name, count, "; ".join(self.skipped), more
            )


def _render_chunks(
    order: Sequence[tuple[int, int]],
    tallies: Sequence[Tally],
    tokenizer: Any,
    max_length: int,
    skip_invalid: bool,
    train_on_prompts: bool,
) -> Iterator[dict[str, list[Any]]]:
    with tqdm(total=len(order), desc="conversations", unit="row", unit_scale=True, disable=None) as progress:
        for begin in range(0, len(order), CHUNK_ROWS):
            chunk = order[begin : begin + CHUNK_ROWS]
            laid_out = [(tallies[member], tallies[member].read(n, skip_invalid=skip_invalid)) for member, n in chunk]
            kept = [(tally, pieces) for tally, pieces in laid_out if pieces is not None]
            rendered = render_pieces(tokenizer, [pieces for _, pieces in kept], max_length=max_length)
            yield _label_rows([tally for tally, _ in kept], rendered, train_on_prompts=train_on_prompts)
            progress.update(len(chunk))


def _label_rows(
    tallies: Sequence[Tally], rendered: Sequence[Rendered], *, train_on_prompts: bool
) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {"input_ids": [], "labels": [], "source": []}
    for tally, row in zip(tallies, rendered, strict=True):
        mask = [1] * len(row.mask) if train_on_prompts else row.mask
        if not tally.admit(row, sum(mask)):
            continue
        columns["input_ids"].append(row.input_ids)
        columns["labels"].append([i if trained else -100 for i, trained in zip(row.input_ids, mask, strict=True)])
        columns["source"].append(tally.source.name)
    return columns


def _gather(chunks: Iterable[dict[str, list[Any]]]) -> Dataset:
    return concatenate_datasets([Dataset.from_dict(columns, features=FEATURES) for columns in chunks])


def _store_on_disk(chunks: Iterable[dict[str, list[Any]]]) -> Dataset:
    """The rows in a file of the system's temporary folder (TMPDIR) that lives as long as this process."""
    folder = Path(tempfile.mkdtemp(prefix="chatmodel-mixture-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with ArrowWriter(path=str(folder / "rows.arrow"), features=FEATURES) as writer:
        for columns in chunks:
            if columns["source"]:
                writer.write_batch(columns)
        written, _ = writer.finalize()
    return Dataset.from_file(str(folder / "rows.arrow")) if written else Dataset.from_dict({}, features=FEATURES)


def _explain_nothing(counts: Sequence[dict[str, Any]], rows: int, max_length: int) -> str:
    lost = [
        f"{count['name']} ({count['dropped']} lost to max_length {max_length}, {count['skipped']} invalid)"
        for count in counts
    ]
    return (
        f"none of the mixture's {rows} conversations can be trained on: {', '.join(lost)}; "
        "raise max_length, or give others"
    )


def describe_counts(counts: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each entry of a mixture, and one for all: conversations, tokens, trained ones, what was lost."""
    total: dict[str, Any] = {"name": "all"} | {key: sum(count[key] for count in counts) for key in COUNTS}
    lines = []
    for count in [*counts, total] if len(counts) > 1 else counts:
        share = count["tokens"] / max(1, total["tokens"])
        losses = {
            "skipped as invalid": "skipped",
            "cut": "cut",
            "left out with nothing to learn or too long": "dropped",
        }
        lost = "".join(f"; {count[key]:,} {what}" for what, key in losses.items() if count[key])
        lines.append(
            f"{count['name']}: {count['rows']:,} conversations, {count['tokens']:,} tokens ({share:.1%}), "
            f"{count['trained_tokens']:,} of them trained{lost}"
        )
    return lines


def preview_mixture(dataset: Dataset, tokenizer: Any, rows: int) -> list[str]:
    """A legend, then so many conversations of each source in colours: a user's own first, then the known ones.

    Args:
        dataset: what `load_mixture` made.
    """
    shown: defaultdict[str, list[int]] = defaultdict(list)
    for number, name in enumerate(dataset["source"]):
        if len(shown[name]) < rows:
            shown[name].append(number)
    lines = [LEGEND]
    for name in sorted(shown, key=lambda name: name in GENERATED_TASKS or name in PUBLIC_TASKS):
        for number in shown[name] if rows else ():
            row = dataset[number]
            rendered = Rendered(row["input_ids"], [int(label != -100) for label in row["labels"]])
            lines.append(f"{name}: {preview_masks(rendered, tokenizer)}")
    return lines


def mix_rows(counts: Sequence[int], *, seed: int) -> list[tuple[int, int]]:
    """(entry, row) pairs of entries with so many rows each, shuffled.

    Source: karpathy/nanochat tasks/common.py@c75fe54, `TaskMixture` (seed 42).
    """
    pairs = [(entry, row) for entry, count in enumerate(counts) for row in range(count)]
    random.Random(seed).shuffle(pairs)
    return pairs


def count_rows(entries: Sequence[MixtureEntry], sources: Sequence[Source]) -> list[int]:
    """How many rows each entry gives, repetitions included; see `MixtureEntry` for epochs and weight."""
    weights = [entry.weight or 0.0 for entry in entries]
    weighted_rows = sum(source.count for source, weight in zip(sources, weights, strict=True) if weight)
    counts = []
    for entry, source, weight in zip(entries, sources, weights, strict=True):
        exact = weighted_rows * weight / sum(weights) if weight else source.count * (entry.epochs or 1)
        counts.append(max(1, round(exact)))
    return counts

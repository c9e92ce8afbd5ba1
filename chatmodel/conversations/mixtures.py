"""Which conversations a model is trained on, in what shares and order: a list of entries becomes a data set of ids."""

import atexit
import logging
import random
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, DatasetInfo
from datasets.arrow_writer import ArrowWriter
from datasets.table import InMemoryTable

from chatmodel.conversations.datasets import PUBLIC_TASKS
from chatmodel.conversations.generated import GENERATED_TASKS
from chatmodel.conversations.render import LEGEND, Rendered, preview_masks
from chatmodel.conversations.rows import COUNTS, FEATURES, Member, RowMaker, Tally, make_rows
from chatmodel.conversations.sources import MixtureEntry, Source, open_entry, parse_mixture
from chatmodel.runtime import UserError

logger = logging.getLogger("chatmodel")

LARGE_MIXTURE = 100_000  # rows, from which on the ids are kept on the disk


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
    maker = RowMaker(
        [Member(source, entry.too_long) for entry, source in zip(parsed, sources, strict=True)],
        tokenizer,
        max_length=max_length,
        skip_invalid=skip_invalid,
        train_on_prompts=train_on_prompts,
    )
    tallies = [Tally(source.name) for source in sources]
    tables = make_rows(order, maker, tallies)
    on_disk = len(order) > LARGE_MIXTURE or any(source.is_stream for source in sources)
    dataset = _store_on_disk(tables) if on_disk else _gather(tables)
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


def _gather(tables: Iterable[pa.Table]) -> Dataset:
    return Dataset(InMemoryTable(pa.concat_tables(tables)), info=DatasetInfo(features=FEATURES))


def _store_on_disk(tables: Iterable[pa.Table]) -> Dataset:
    """The rows in a file of the system's temporary folder (TMPDIR) that lives as long as this process."""
    folder = Path(tempfile.mkdtemp(prefix="chatmodel-mixture-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with ArrowWriter(path=str(folder / "rows.arrow"), features=FEATURES) as writer:
        for table in tables:
            writer.write_table(table)
        writer.finalize()
    return Dataset.from_file(str(folder / "rows.arrow"))


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

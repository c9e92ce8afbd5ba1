"""Which conversations a model is trained on, in what shares and order: a list of entries becomes a data set of ids."""

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value, concatenate_datasets
from tqdm import tqdm

from chatmodel.conversations.datasets import (
    PUBLIC_TASKS,
    read_hub_rows,
    read_task_rows,
    shuffled_order,
    task_messages,
)
from chatmodel.conversations.files import ENDINGS, Rows, convert_row, read_rows
from chatmodel.conversations.generated import GENERATED_TASKS, WORD_TASKS, generate_conversation, select_words
from chatmodel.conversations.identity import load_identity
from chatmodel.conversations.render import Messages, Piece, Rendered, lay_out, render_pieces
from chatmodel.data.words import load_words
from chatmodel.runtime import UserError

logger = logging.getLogger("chatmodel")

GENERATED_ROWS = 1000
CHUNK_ROWS = 1024
FEATURES = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32")), "source": Value("string")})


@dataclass(frozen=True)
class MixtureEntry:
    """One line of a mixture.

    name: a public data set (`PUBLIC_TASKS`), a generated task (`GENERATED_TASKS`), a data set "owner/name" on the
        Hub, or any label when `path` says where the conversations are.
    path: a file or folder of conversations; for a public data set the folder of its files; for generated tasks the
        word list, or the YAML file of "Identity".
    split: "train", or for a validation mixture what each task holds out. A user's file has none: all of it is read.
    rows: at most so many, after a shuffle; a generated task makes exactly so many (1000 unless said).
    epochs: how often they are repeated; may be a fraction.
    weight: instead of epochs: this entry's share of all rows that the weighted entries have together.
    """

    name: str
    path: str | None = None
    split: str | None = None
    rows: int | None = None
    epochs: float | None = None
    weight: float | None = None


@dataclass(frozen=True)
class Source:
    """An opened entry: `count` conversations, by number, and how an error names one."""

    name: str
    count: int
    read: Callable[[int], Messages]
    locate: Callable[[int], str]


def parse_mixture(entries: Sequence[Any]) -> list[MixtureEntry]:
    """The entries of a recipe's YAML list: mappings, or just the name.

    Raises:
        UserError: an empty list, an unknown key, or a value that makes no sense, each naming the entry.
    """
    if not isinstance(entries, list | tuple) or not entries:
        raise UserError("the mixture is empty; list at least one entry, such as {name: GSM8K}")
    return [_parse_entry(number, entry) for number, entry in enumerate(entries, start=1)]


def _parse_entry(number: int, entry: Any) -> MixtureEntry:
    if isinstance(entry, MixtureEntry):
        return entry
    entry = {"name": entry} if isinstance(entry, str) else entry
    known = [field.name for field in fields(MixtureEntry)]
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise UserError(f"mixture entry {number} has no name; write it as {{name: ..., rows: ...}}")
    where = f"mixture entry {number} ({entry['name']})"
    unknown = [key for key in entry if key not in known]
    if unknown:
        raise UserError(f"{where} has the unknown key '{unknown[0]}'; known are {', '.join(known)}")
    for key in ("path", "split"):
        if not isinstance(entry.get(key), str | None):
            raise UserError(f"{where} has {key} {entry[key]!r}; it must be text")
    for key, types in {"rows": (int,), "epochs": (int, float), "weight": (int, float)}.items():
        value = entry.get(key)
        if value is not None and (type(value) not in types or value <= 0):
            raise UserError(f"{where} has {key} {value!r}; give a number above 0{', whole' if key == 'rows' else ''}")
    if entry.get("weight") is not None and entry.get("epochs") is not None:
        raise UserError(f"{where} has both epochs and weight; give one of them")
    return MixtureEntry(**entry)


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

    Rows longer than `max_length` lose their end; one that loses all it would be trained on is left out, so that every
    row has a label after its first position. The order follows from `seed` alone.

    Args:
        entries: what `parse_mixture` takes.
        skip_invalid: leave out (and count) conversations that cannot be rendered instead of raising.
        chatcore_folder: where files of public data sets are looked for before the Hub.
        words: for the word tasks without a `path`; the embedded list if None.
        split: for entries without one: "train", or "validation" for what each task holds out.
        train_on_prompts: label all ids, as nanochat's mid-training does, not only the assistant's.

    Returns:
        The data set, and for each entry its `name`, `rows`, `tokens`, `trained_tokens`, `skipped` (invalid), `cut`
        (too long) and `dropped` (nothing left to train on).

    Raises:
        UserError: an entry or a conversation is wrong; `DataAbsent` where data is missing.

    Source: karpathy/nanochat tasks/common.py@c75fe54, `TaskMixture`; the order is its order.
    """
    if max_length < 2:
        raise UserError(f"max_length is {max_length}; a row needs at least 2 tokens")
    parsed = parse_mixture(entries)
    sources = [open_entry(entry, split=split, folder=chatcore_folder, words=words) for entry in parsed]
    order = mix_rows(count_rows(parsed, sources), seed=seed)
    counts = [
        {"name": source.name} | dict.fromkeys(("rows", "tokens", "trained_tokens", "skipped", "cut", "dropped"), 0)
        for source in sources
    ]
    parts = []
    with tqdm(total=len(order), desc="conversations", unit="row", unit_scale=True, disable=None) as progress:
        for begin in range(0, len(order), CHUNK_ROWS):
            chunk = order[begin : begin + CHUNK_ROWS]
            laid_out = list(_lay_out_rows(chunk, sources, counts, skip_invalid=skip_invalid))
            rendered = render_pieces(tokenizer, [pieces for _, pieces in laid_out], max_length=max_length)
            members = [member for member, _ in laid_out]
            parts.append(_build_rows(members, rendered, counts, train_on_prompts=train_on_prompts))
            progress.update(len(chunk))
    dataset = concatenate_datasets(parts)
    if not len(dataset):
        raise UserError(f"none of the mixture's {len(order)} conversations can be trained on; look at {counts}")
    _log_losses(counts)
    return dataset, counts


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


def open_entry(
    entry: MixtureEntry, *, split: str = "train", folder: Path | None = None, words: Sequence[str] | None = None
) -> Source:
    """Find the conversations of an entry; `split`, `folder` and `words` as in `load_mixture`.

    Raises:
        UserError: an unknown name, or no such file.
    """
    if entry.name in GENERATED_TASKS:
        return _open_generated(entry, entry.split or ("train" if split == "train" else "test"), words)
    if entry.name in PUBLIC_TASKS:
        held_out = PUBLIC_TASKS[entry.name].held_out
        place = Path(entry.path) if entry.path else folder
        rows = read_task_rows(entry.name, entry.split or ("train" if split == "train" else held_out), place)
        return _open_rows(entry, rows, lambda row: task_messages(entry.name, row))
    path = Path(entry.path or entry.name)
    if entry.path or path.exists() or path.name.endswith(ENDINGS):
        return _open_rows(entry, read_rows(path), convert_row)
    if entry.name.count("/") == 1:
        return _open_rows(entry, read_hub_rows(entry.name, entry.split or split), convert_row)
    known = ", ".join([*GENERATED_TASKS, *PUBLIC_TASKS])
    raise UserError(
        f"the mixture's '{entry.name}' is not known ({known}); give it a path to a file of conversations, "
        "or the owner/name of a data set on the Hub"
    )


def _open_generated(entry: MixtureEntry, split: str, words: Sequence[str] | None) -> Source:
    chosen: list[str] = []
    if entry.name in WORD_TASKS:
        chosen = select_words(load_words(entry.path or "embedded") if entry.path or words is None else words, split)
    identity = load_identity(entry.path) if entry.name == "Identity" and entry.path else None

    def read(index: int) -> Messages:
        return generate_conversation(entry.name, index, split=split, words=chosen, identity=identity)

    return Source(entry.name, entry.rows or GENERATED_ROWS, read, lambda index: f"{entry.name} {index}")


def _open_rows(entry: MixtureEntry, rows: Rows, convert: Callable[[Any], Messages]) -> Source:
    order = shuffled_order(len(rows.rows))

    def read(index: int) -> Messages:
        return convert(rows.rows[int(order[index])])

    count = min(len(order), entry.rows or len(order))
    return Source(entry.name, count, read, lambda index: rows.locate(int(order[index])))


def _lay_out_rows(
    chunk: Sequence[tuple[int, int]], sources: Sequence[Source], counts: list[dict[str, Any]], *, skip_invalid: bool
) -> Iterator[tuple[int, list[Piece]]]:
    for member, number in chunk:
        source = sources[member]
        row = number % source.count
        try:
            yield member, lay_out(source.read(row))
        except UserError as error:
            if not skip_invalid:
                raise UserError(f"{source.locate(row)}: {error} (skip_invalid leaves such rows out)") from None
            counts[member]["skipped"] += 1


def _build_rows(
    members: Sequence[int], rendered: Sequence[Rendered], counts: list[dict[str, Any]], *, train_on_prompts: bool
) -> Dataset:
    columns: dict[str, list[Any]] = {"input_ids": [], "labels": [], "source": []}
    for member, row in zip(members, rendered, strict=True):
        count = counts[member]
        count["cut"] += row.cut > 0
        trained_tokens = len(row.mask) if train_on_prompts else sum(row.mask)
        if not trained_tokens:
            count["dropped"] += 1
            continue
        count["rows"] += 1
        count["tokens"] += len(row.mask)
        count["trained_tokens"] += trained_tokens
        labels = [
            token_id if trained or train_on_prompts else -100
            for token_id, trained in zip(row.input_ids, row.mask, strict=True)
        ]
        columns["input_ids"].append(row.input_ids)
        columns["labels"].append(labels)
        columns["source"].append(count["name"])
    return Dataset.from_dict(columns, features=FEATURES)


def _log_losses(counts: Sequence[dict[str, Any]]) -> None:
    for count in counts:
        if count["skipped"] or count["cut"] or count["dropped"]:
            logger.info(
                "%s: %d conversations left out as invalid; %d cut, %d of them left out with nothing to learn",
                *(count[key] for key in ("name", "skipped", "cut", "dropped")),
            )

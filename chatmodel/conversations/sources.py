"""Where do the conversations of a mixture's entry come from, and how is one of them found?"""

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

from chatmodel.arguments import suggest
from chatmodel.conversations.datasets import (
    PUBLIC_TASKS,
    SHUFFLE_SEED,
    find_task_place,
    read_hub_rows,
    shuffled_order,
    stream_hub_rows,
    task_messages,
)
from chatmodel.conversations.files import ENDINGS, Rows, convert_row, read_rows, stream_rows
from chatmodel.conversations.generated import GENERATED_TASKS, WORD_TASKS, generate_conversation, select_words
from chatmodel.conversations.identity import load_identity
from chatmodel.conversations.render import Messages
from chatmodel.data.words import load_words
from chatmodel.runtime import UserError

T = TypeVar("T")
GENERATED_ROWS = 1000
SHUFFLE_ROWS = 10_000  # of a stream are held and drawn from
TOO_LONG = ("cut", "drop")


@dataclass(frozen=True)
class MixtureEntry:
    """One line of a mixture.

    name: a public data set (`PUBLIC_TASKS`), a generated task (`GENERATED_TASKS`), a data set "owner/name" on the
        Hub, or any label when `path` says where the conversations are.
    path: a file or folder of conversations; for a public data set also the folder of its files; for generated tasks
        the word list; for "Identity" as `facts`.
    facts: the YAML file of "Identity" (and of "MultiTurn"); see `load_identity`.
    turns: the most questions in a conversation of "Identity" (1 unless said) or "MultiTurn" (3).
    split: "train", or for a validation mixture what each task holds out. A user's file has none: all of it is read.
    rows: at most so many, after a shuffle; a generated task makes exactly so many (1000 unless said).
    epochs: how often they are repeated; may be a fraction.
    weight: instead of epochs: this entry's share of all rows that the weighted entries have together.
    too_long: "cut" conversations longer than a row at its end (the default), or "drop" them.
    streaming: read the first `rows` one by one instead of fetching and holding all; drawn from 10,000 at a time.
    """

    name: str
    path: str | None = None
    facts: str | None = None
    turns: int | None = None
    split: str | None = None
    rows: int | None = None
    epochs: float | None = None
    weight: float | None = None
    too_long: str = "cut"
    streaming: bool = False


@dataclass(frozen=True)
class Source:
    """An opened entry: `count` conversations, by number, and how an error names one."""

    name: str
    count: int
    read: Callable[[int], Messages]
    locate: Callable[[int], str]
    is_stream: bool = False


class StreamFailure(UserError):
    """A stream gives no more rows; unlike a wrong row this cannot be skipped."""


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
        near = suggest(unknown[0], known)
        raise UserError(f"{where} has the unknown key '{unknown[0]}'{near}; known are {', '.join(known)}")
    for key in ("path", "facts", "split"):
        if not isinstance(entry.get(key), str | None):
            raise UserError(f"{where} has {key} {entry[key]!r}; it must be text")
    _check_numbers(where, entry)
    _check_options(where, entry)
    return MixtureEntry(**entry)


def _check_numbers(where: str, entry: dict[str, Any]) -> None:
    kinds = {"rows": (int,), "turns": (int,), "epochs": (int, float), "weight": (int, float)}
    for key, types in kinds.items():
        value = entry.get(key)
        if value is not None and not (type(value) in types and 0 < value < math.inf):
            whole = "" if float in types else ", whole"
            raise UserError(f"{where} has {key} {value!r}; give a number above 0{whole}")
    if entry.get("weight") is not None and entry.get("epochs") is not None:
        raise UserError(f"{where} has both epochs and weight; give one of them")


def _check_options(where: str, entry: dict[str, Any]) -> None:
    if entry.get("too_long", "cut") not in TOO_LONG:
        raise UserError(f"{where} has too_long {entry['too_long']!r}; it must be 'cut' or 'drop'")
    streaming = entry.get("streaming", False)
    if not isinstance(streaming, bool):
        raise UserError(f"{where} has streaming {streaming!r}; it must be true or false")
    if streaming and entry["name"] in GENERATED_TASKS:
        raise UserError(f"{where} is generated, so there is nothing to stream; leave streaming out")
    if streaming and entry.get("rows") is None:
        raise UserError(f"{where} is streamed, so its length is not known; say how many rows of it to take")
    for key in ("facts", "turns"):
        if entry.get(key) is not None and entry["name"] not in ("Identity", "MultiTurn"):
            raise UserError(f"{where} has {key}, which only Identity and MultiTurn have; leave them out")


def open_entry(
    entry: MixtureEntry,
    *,
    split: str = "train",
    folder: Path | None = None,
    words: Sequence[str] | None = None,
    skip_invalid: bool = False,
) -> Source:
    """Find the conversations of an entry; `split`, `folder`, `words` and `skip_invalid` as in `load_mixture`.

    Raises:
        UserError: an unknown name, or no such file.
    """
    if entry.name in GENERATED_TASKS:
        return _open_generated(entry, entry.split or ("train" if split == "train" else "test"), words)
    convert = partial(task_messages, entry.name) if entry.name in PUBLIC_TASKS else convert_row
    place = _find_place(entry, split, folder)
    if isinstance(place, Path):
        if entry.streaming:
            return _open_stream(entry, partial(stream_rows, place), convert)
        return _open_rows(entry, read_rows(place, keep_bad=skip_invalid), convert)
    if entry.streaming:
        return _open_stream(entry, partial(stream_hub_rows, **place), convert)
    return _open_rows(entry, read_hub_rows(**place), convert)


def _find_place(entry: MixtureEntry, split: str, folder: Path | None) -> Path | dict[str, Any]:
    """A file or folder, or what `read_hub_rows` takes."""
    path = Path(entry.path or entry.name)
    if entry.name in PUBLIC_TASKS and not (entry.path and (path.is_file() or path.name.endswith(ENDINGS))):
        part = entry.split or ("train" if split == "train" else PUBLIC_TASKS[entry.name].held_out)
        return find_task_place(entry.name, part, path if entry.path else folder)
    if entry.path or path.exists() or path.name.endswith(ENDINGS):
        return path
    if entry.name.count("/") == 1:
        return {"hub": entry.name, "split": entry.split or split}
    known = (*GENERATED_TASKS, *PUBLIC_TASKS)
    raise UserError(
        f"the mixture's '{entry.name}' is not known{suggest_name(entry.name, known)}; known are {', '.join(known)}; "
        "or give it a path to a file of conversations, or write the owner/name of a data set on the Hub"
    )


def suggest_name(name: str, known: Sequence[str]) -> str:
    """The words " (did you mean ...?)" for the known name that is nearest, whatever its case; else nothing."""
    by_lower = {each.lower(): each for each in known}
    hint = suggest(name.lower(), list(by_lower))
    for lower, each in by_lower.items():
        hint = hint.replace(f" {lower}?", f" {each}?")
    return hint


def _open_generated(entry: MixtureEntry, split: str, words: Sequence[str] | None) -> Source:
    chosen: list[str] = []
    if entry.name in WORD_TASKS:
        chosen = select_words(load_words(entry.path or "embedded") if entry.path or words is None else words, split)
    facts = entry.facts or (entry.path if entry.name == "Identity" else None)
    identity = load_identity(facts) if facts else None

    def read(index: int) -> Messages:
        return generate_conversation(
            entry.name, index, split=split, words=chosen, identity=identity, turns=entry.turns
        )

    return Source(entry.name, entry.rows or GENERATED_ROWS, read, lambda index: f"{entry.name} {index}")


def _open_rows(entry: MixtureEntry, rows: Rows, convert: Callable[[Any], Messages]) -> Source:
    order = shuffled_order(len(rows.rows))

    def read(index: int) -> Messages:
        return convert(rows.rows[int(order[index])])

    count = min(len(order), entry.rows or len(order))
    return Source(entry.name, count, read, lambda index: rows.locate(int(order[index])))


def _open_stream(
    entry: MixtureEntry, start: Callable[[], Iterator[tuple[str, Any]]], convert: Callable[[Any], Messages]
) -> Source:
    stream = Stream(start, entry.rows or 1, label=entry.name)
    return Source(
        entry.name, stream.rows, lambda index: convert(stream.read(index)), lambda index: stream.where, is_stream=True
    )


class Stream:
    """The first `rows` of a stream, shuffled through a buffer; fast while they are asked for in order.

    Args:
        start: begins the stream, which gives (where, row).
    """

    def __init__(self, start: Callable[[], Iterator[tuple[str, Any]]], rows: int, *, label: str) -> None:
        self.start, self.rows, self.label = start, rows, label
        self.where = label
        self._begin()

    def _begin(self) -> None:
        """Reads as far as the buffer goes, so that what is not there is said before any work."""
        self.position = 0
        stream = shuffle_stream(islice(self.start(), self.rows), hold=SHUFFLE_ROWS)
        self._stream = chain(list(islice(stream, 1)), stream)

    def read(self, index: int) -> Any:
        """The row at a place of the shuffled stream; going back starts the stream anew.

        Raises:
            StreamFailure: the stream has fewer than `rows`, or breaks off.
        """
        try:
            if index < self.position:
                self._begin()
            for where, row in self._stream:
                self.position += 1
                if self.position > index:
                    self.where = where
                    return row
        except UserError as error:
            raise StreamFailure(str(error)) from None
        self.where = self.label
        raise StreamFailure(f"the stream ends after {self.position} rows, but {self.rows} are asked for; lower rows")


def shuffle_stream(items: Iterable[T], *, hold: int) -> Iterator[T]:
    """All items, each drawn from the `hold` that came next when it left; the same order every time."""
    rng = random.Random(SHUFFLE_SEED)
    held: list[T] = []
    for item in items:
        if len(held) < hold:
            held.append(item)
            continue
        place = rng.randrange(hold)
        yield held[place]
        held[place] = item
    rng.shuffle(held)
    yield from held

"""How a user's own conversations are read: files in four layouts, with messages in three."""

import contextlib
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, concatenate_datasets
from datasets.exceptions import DatasetsError

from chatmodel.conversations.render import Message, Messages
from chatmodel.data.files import one_line, open_text
from chatmodel.runtime import UserError

ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".parquet")
BATCH_ROWS = 1024  # of a parquet file that is streamed
SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


@dataclass(frozen=True)
class Rows:
    """Rows of one or more files; `parts` names each with its number of rows."""

    rows: Sequence[Any]
    parts: tuple[tuple[str, int], ...]

    def locate(self, index: int) -> str:
        """How a message names a row: its file and its number there, from 1."""
        for name, count in self.parts:
            if index < count:
                return f"{name}, row {index + 1}"
            index -= count
        raise IndexError(index)


@dataclass(frozen=True)
class BadRow:
    """A line that is no row, kept in its place until it is skipped or complained about."""

    problem: str


def read_rows(path: Path, *, keep_bad: bool = False) -> Rows:
    """The rows of a file, or of all files in a folder in the order of their names.

    Args:
        keep_bad: a line of a .jsonl file that is no JSON becomes a `BadRow` instead of an error.

    Raises:
        UserError: nothing there, an unknown ending, or a damaged or empty file.
    """
    files = list_files(path)
    contents = [_read_file(file, keep_bad=keep_bad) for file in files]
    parts = tuple((str(file), len(rows)) for file, rows in zip(files, contents, strict=True))
    if len(files) == 1:
        return Rows(contents[0], parts)
    if all(isinstance(rows, Dataset) for rows in contents):
        return Rows(concatenate_datasets(contents), parts)
    return Rows([row for rows in contents for row in rows], parts)


def stream_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(where, row) of a file or folder as `read_rows` reads it, one by one; a line that is no JSON is a `BadRow`."""
    for file in list_files(path):
        with _explain_damage(file):
            number = 0
            for number, row in enumerate(_stream_file(file), start=1):
                yield f"{file}, row {number}", row
        if not number:
            raise UserError(f"{file} is empty; give a file with at least one conversation")


def list_files(path: Path) -> list[Path]:
    """The file itself, or the files of conversations in a folder by name.

    Raises:
        UserError: nothing there, or a file with an unknown ending.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; give a file ({', '.join(ENDINGS)}) or a folder of them")
    if path.is_file():
        if not path.name.endswith(ENDINGS):
            raise UserError(f"{path} has an unknown ending; files of conversations end in {', '.join(ENDINGS)}")
        return [path]
    files = sorted(file for file in path.iterdir() if file.name.endswith(ENDINGS))
    if not files:
        raise UserError(f"the folder {path} holds no file that ends in {', '.join(ENDINGS)}; put conversations there")
    return files


def _read_file(path: Path, *, keep_bad: bool) -> Sequence[Any]:
    with _explain_damage(path):
        rows = Dataset.from_parquet(str(path)) if path.suffix == ".parquet" else list(_stream_file(path))
    if not len(rows):
        raise UserError(f"{path} is empty; give a file with at least one conversation")
    bad = None if keep_bad or isinstance(rows, Dataset) else next((r for r in rows if isinstance(r, BadRow)), None)
    if bad is not None:
        raise UserError(f"{path}, {bad.problem}")
    return rows


@contextlib.contextmanager
def _explain_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, UnicodeDecodeError, zlib.error, pa.ArrowInvalid, DatasetsError) as error:
        raise UserError(f"{path} is damaged and cannot be read ({one_line(error)}); get it again") from None


def _stream_file(path: Path) -> Iterator[Any]:
    if path.suffix == ".parquet":
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=BATCH_ROWS):
                yield from batch.to_pylist()
        return
    with open_text(path, errors="surrogateescape") as lines:
        if path.suffix == ".json":
            yield from _parse_list(lines.read(), path)
            return
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _parse_line(line, number)


def _parse_line(line: str, number: int) -> Any:
    try:
        line.encode()
    except UnicodeEncodeError:
        return BadRow(f"line {number} is not UTF-8 text; save the file as UTF-8, or remove the line")
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:  # also of a number with thousands of digits
        return BadRow(f"line {number} is not valid JSON ({one_line(error)}); mend or remove it")


def _parse_list(text: str, path: Path) -> list[Any]:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{path} is not UTF-8 text; save it as UTF-8") from None
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({one_line(error)}); mend or remove it") from None
    if not isinstance(rows, list):
        raise UserError(f"{path} holds no list of conversations; put them into one [...], or use .jsonl")
    return rows


def convert_row(row: Any) -> Messages:
    """The messages of a user's row: `messages` (or a bare list of them), ShareGPT's `conversations`, or Alpaca's
    `instruction`, `input` and `output`.

    Raises:
        UserError: none of these.
    """
    if isinstance(row, BadRow):
        raise UserError(row.problem)
    if isinstance(row, list):
        return row
    if isinstance(row, dict):
        if isinstance(row.get("messages"), list):
            return row["messages"]
        if isinstance(row.get("conversations"), list):
            return [_convert_turn(turn) for turn in row["conversations"]]
        if "instruction" in row and "output" in row:
            return _convert_instruction(row)
    columns = ", ".join(row) if isinstance(row, dict) else type(row).__name__
    raise UserError(
        f"the row has no conversation in it (found: {columns}); give 'messages' (role, content), 'conversations' "
        "(from, value), or 'instruction', 'input', 'output'"
    )


def _convert_instruction(row: dict[str, Any]) -> Messages:
    for column in ("instruction", "input", "output"):
        if not isinstance(row.get(column), str | None):
            raise UserError(f"'{column}' is {row[column]!r:.60}, which is no text")
    question = "\n\n".join(text for text in (row["instruction"], row.get("input")) if text)
    return [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]


def _convert_turn(turn: Any) -> Message:
    if isinstance(turn, dict) and "role" in turn and "content" in turn:
        return turn
    if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
        raise UserError(f"a turn of 'conversations' is not of the form {{from, value}}, but {turn!r:.60}")
    if not isinstance(turn["from"], str) or turn["from"] not in SHAREGPT_ROLES:
        raise UserError(f"a turn is from {turn['from']!r:.60}, which is none of {', '.join(SHAREGPT_ROLES)}")
    return {"role": SHAREGPT_ROLES[turn["from"]], "content": turn["value"]}

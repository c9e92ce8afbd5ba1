"""How a user's own conversations are read: files in four layouts, with messages in three."""

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, concatenate_datasets
from datasets.exceptions import DatasetsError

from chatmodel.conversations.render import Message, Messages
from chatmodel.data.files import one_line, open_text
from chatmodel.runtime import UserError

ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".parquet")
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


def read_rows(path: Path) -> Rows:
    """The rows of a file, or of all files in a folder in the order of their names.

    Raises:
        UserError: nothing there, an unknown ending, or a damaged or empty file.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; give a file ({', '.join(ENDINGS)}) or a folder of them")
    if path.is_file():
        rows = _read_file(path)
        return Rows(rows, ((str(path), len(rows)),))
    files = sorted(file for file in path.iterdir() if file.name.endswith(ENDINGS))
    if not files:
        raise UserError(f"the folder {path} holds no file that ends in {', '.join(ENDINGS)}; put conversations there")
    contents = [_read_file(file) for file in files]
    parts = tuple((str(file), len(rows)) for file, rows in zip(files, contents, strict=True))
    if all(isinstance(rows, Dataset) for rows in contents):
        return Rows(concatenate_datasets(contents), parts)
    return Rows([row for rows in contents for row in rows], parts)


def _read_file(path: Path) -> Sequence[Any]:
    if not path.name.endswith(ENDINGS):
        raise UserError(f"{path} has an unknown ending; files of conversations end in {', '.join(ENDINGS)}")
    try:
        rows = Dataset.from_parquet(str(path)) if path.suffix == ".parquet" else _read_json(path)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error, pa.ArrowInvalid, DatasetsError) as error:
        raise UserError(f"{path} is damaged and cannot be read ({one_line(error)}); get it again") from None
    if not len(rows):
        raise UserError(f"{path} is empty; give a file with at least one conversation")
    return rows


def _read_json(path: Path) -> list[Any]:
    with open_text(path) as lines:
        if path.suffix == ".json":
            rows = _parse_json(lines.read(), str(path))
            if not isinstance(rows, list):
                raise UserError(f"{path} holds no list of conversations; put them into one [...], or use .jsonl")
            return rows
        return [_parse_json(line, f"{path}, line {n}") for n, line in enumerate(lines, start=1) if line.strip()]


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not valid JSON ({error}); mend or remove it") from None


def convert_row(row: Any) -> Messages:
    """The messages of a user's row: `messages` (or a bare list of them), ShareGPT's `conversations`, or Alpaca's
    `instruction`, `input` and `output`.

    Raises:
        UserError: none of these.
    """
    if isinstance(row, list):
        return row
    if isinstance(row, dict):
        if isinstance(row.get("messages"), list):
            return row["messages"]
        if isinstance(row.get("conversations"), list):
            return [_convert_turn(turn) for turn in row["conversations"]]
        if "instruction" in row and "output" in row:
            question = "\n\n".join(text for text in (row["instruction"], row.get("input")) if text)
            return [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]
    columns = ", ".join(row) if isinstance(row, dict) else type(row).__name__
    raise UserError(
        f"the row has no conversation in it (found: {columns}); give 'messages' (role, content), 'conversations' "
        "(from, value), or 'instruction', 'input', 'output'"
    )


def _convert_turn(turn: Any) -> Message:
    if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
        raise UserError(f"a turn of 'conversations' is not of the form {{from, value}}, but {turn!r:.60}")
    if turn["from"] not in SHAREGPT_ROLES:
        raise UserError(f"a turn is from {turn['from']!r:.60}, which is none of {', '.join(SHAREGPT_ROLES)}")
    return {"role": SHAREGPT_ROLES[turn["from"]], "content": turn["value"]}

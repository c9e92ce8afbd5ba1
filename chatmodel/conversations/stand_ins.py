"""Which files of a folder take the place of a mixture's data sets from the Hub?"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chatmodel.conversations.files import ENDINGS
from chatmodel.runtime import UserError


def choose_sources(entries: Sequence[Any], folder: Path | None) -> list[Any]:
    """A mixture's entries, each one that lists `stand_ins` replaced by them when there is a folder of files.

    A stand-in is an entry whose `path` is looked for in the folder; its name is the file's unless it has one. Without
    a folder the entry stays as it is, so that the same mixture means the Hub's data set.

    Raises:
        UserError: the folder or a file that stands in is not there, or `stand_ins` is no list of mappings.
    """
    if folder is not None and not folder.is_dir():
        raise UserError(f"conversations {folder} is no folder; make it with scripts/prepare_conversations.py")
    chosen: list[Any] = []
    for entry in entries:
        if not isinstance(entry, dict) or "stand_ins" not in entry:
            chosen.append(entry)
        elif folder is None:
            chosen.append({key: value for key, value in entry.items() if key != "stand_ins"})
        else:
            chosen += [_find_stand_in(each, entry, folder) for each in _list_stand_ins(entry)]
    return chosen


def _list_stand_ins(entry: dict[str, Any]) -> list[dict[str, Any]]:
    stand_ins = entry["stand_ins"]
    if not isinstance(stand_ins, list) or not all(
        isinstance(each, dict) and isinstance(each.get("path"), str) for each in stand_ins
    ):
        raise UserError(
            f"stand_ins of {entry.get('name')} are {stand_ins!r}; write a list such as [{{path: chats.jsonl}}]"
        )
    return stand_ins


def _find_stand_in(stand_in: dict[str, Any], entry: dict[str, Any], folder: Path) -> dict[str, Any]:
    path = folder / stand_in["path"]
    if not path.exists():
        raise UserError(f"{stand_in['path']}, which stands in for {entry.get('name')}, is not in {folder}")
    return {"name": _strip_ending(path.name)} | stand_in | {"path": str(path)}


def _strip_ending(name: str) -> str:
    for ending in sorted(ENDINGS, key=len, reverse=True):
        name = name.removesuffix(ending)
    return name

"""Which public data sets are known by name, where their rows come from, and how a row becomes a conversation."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, config, load_dataset
from datasets.exceptions import DatasetsError
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError

from chatmodel.conversations.files import BadRow, Rows, convert_row, read_rows
from chatmodel.conversations.render import Messages
from chatmodel.data.files import one_line, open_text
from chatmodel.runtime import UserError

LETTERS = ("A", "B", "C", "D")
SHUFFLE_SEED = 42
WORD_LIST = "words_alpha.txt"
WORD_LIST_URL = "https://raw.githubusercontent.com/dwyl/english-words/master/words_alpha.txt"


class DataAbsent(UserError):
    """Data is neither in the given folder nor on a Hub in reach; `how` is the command or step that gets it."""

    def __init__(self, reason: str, *, how: str) -> None:
        super().__init__(f"{reason}; to get it: {how}")
        self.reason = reason
        self.how = how


@dataclass(frozen=True)
class PublicTask:
    """A data set on the Hub; in a local folder its split lies as `<stem>_<split>.jsonl(.gz)` or `.parquet`.

    `subsets` maps a split to its subset on the Hub ("" is for all others); `held_out` is the split for validation.
    """

    hub: str
    stem: str
    splits: tuple[str, ...]
    held_out: str
    subsets: dict[str, str | None]

    def subset(self, split: str) -> str | None:
        """The subset on the Hub that has a split."""
        return self.subsets.get(split, self.subsets[""])


PUBLIC_TASKS = {
    "ARC-Easy": PublicTask(
        "allenai/ai2_arc", "arc_easy", ("train", "validation", "test"), "validation", {"": "ARC-Easy"}
    ),
    "ARC-Challenge": PublicTask(
        "allenai/ai2_arc", "arc_challenge", ("train", "validation", "test"), "validation", {"": "ARC-Challenge"}
    ),
    "MMLU": PublicTask(
        "cais/mmlu",
        "mmlu",
        ("train", "validation", "dev", "test"),
        "validation",
        {"": "all", "train": "auxiliary_train"},  # a subset of its own, whose only split is called "train"
    ),
    "GSM8K": PublicTask("openai/gsm8k", "gsm8k", ("train", "test"), "test", {"": "main"}),
    "HumanEval": PublicTask("openai/openai_humaneval", "humaneval", ("test",), "test", {"": None}),
    "SmolTalk": PublicTask("HuggingFaceTB/smol-smoltalk", "smoltalk", ("train", "test"), "test", {"": None}),
}


def load_task_rows(name: str, split: str, folder: Path | None = None) -> Sequence[dict[str, Any]]:
    """The rows of a known data set in nanochat's order: shuffled with seed 42 whatever their source.

    Args:
        folder: looked in first; what is not there comes from the Hub, or from the Hub's cache on this disk.

    Raises:
        DataAbsent: the rows are in neither.
        UserError: an unknown data set or split, or damaged files.

    Source: karpathy/nanochat tasks/*.py@c75fe54, `load_dataset(...).shuffle(seed=42)`.
    """
    rows = read_task_rows(name, split, folder).rows
    order = shuffled_order(len(rows))
    return rows.select(order) if isinstance(rows, Dataset) else [rows[int(index)] for index in order]


def shuffled_order(count: int) -> "np.ndarray[Any, np.dtype[np.int64]]":
    """(count,): the order in which `datasets.Dataset.shuffle(seed=42)` puts rows."""
    return np.random.default_rng(SHUFFLE_SEED).permutation(count)


def read_task_rows(name: str, split: str, folder: Path | None = None) -> Rows:
    """`load_task_rows` in the order of the source."""
    place = find_task_place(name, split, folder)
    return read_rows(place) if isinstance(place, Path) else read_hub_rows(**place)


def find_task_place(name: str, split: str, folder: Path | None) -> Path | dict[str, Any]:
    """The file of a known data set's split in a folder, else what `read_hub_rows` takes.

    Raises:
        UserError: an unknown data set or split, or no such folder.
    """
    task = _find_task(name, split)
    absent = ""
    if folder is not None:
        if not folder.is_dir():
            raise UserError(f"the data folder {folder} does not exist; give a folder with files such as {task.stem}_*")
        for ending in (".jsonl.gz", ".jsonl", ".parquet"):
            path = folder / f"{task.stem}_{split}{ending}"
            if path.exists():
                return path
        absent = f"{task.stem}_{split}.jsonl(.gz) is not in {folder}, and "
    return {"hub": task.hub, "split": split, "subset": task.subset(split), "absent": absent, "label": name}


def _find_task(name: str, split: str) -> PublicTask:
    if name not in PUBLIC_TASKS:
        raise UserError(f"there is no known data set '{name}'; known are {', '.join(PUBLIC_TASKS)}")
    if split not in PUBLIC_TASKS[name].splits:
        raise UserError(f"{name} has no split '{split}'; it has {', '.join(PUBLIC_TASKS[name].splits)}")
    return PUBLIC_TASKS[name]


def read_hub_rows(hub: str, split: str, *, subset: str | None = None, absent: str = "", label: str = "") -> Rows:
    """The rows of one split of a data set on the Hub.

    Args:
        absent: said first when the data is not to be had: where else it was looked for.

    Raises:
        DataAbsent: the Hub cannot be reached and its cache does not hold the data set, or the split is not there.
    """
    rows = _load_hub(hub, split, subset=subset, absent=absent, label=label, streaming=False)
    return Rows(rows, ((f"{hub} ({split})", len(rows)),))


def stream_hub_rows(
    hub: str, split: str, *, subset: str | None = None, absent: str = "", label: str = ""
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of `read_hub_rows`, fetched as they are read; raises as it does."""
    rows = _load_hub(hub, split, subset=subset, absent=absent, label=label, streaming=True)
    for number, row in enumerate(rows, start=1):
        yield f"{hub} ({split}), row {number}", row


def _load_hub(hub: str, split: str, *, subset: str | None, absent: str, label: str, streaming: bool) -> Any:
    how = f"`hf download {hub} --repo-type dataset` where the Hub can be reached"
    name = f"{label or hub} ({split}) is absent: {absent}the data set {hub}"
    try:
        # load_dataset retries for 20 s before it gives up on a missing network; this asks once.
        HfApi().dataset_info(hub, timeout=10)
    except RepositoryNotFoundError:
        raise DataAbsent(f"{name} is not on the Hub (or private)", how="check the name, or `hf auth login`") from None
    except Exception as error:  # httpx, time-outs, offline mode: whichever the hub's client raises
        if streaming or not _is_cached(hub):
            raise DataAbsent(f"{name} cannot be reached on the Hub ({type(error).__name__})", how=how) from None
    options = {"streaming": True} if streaming else {}
    try:
        return load_dataset(hub, subset, split=split, **options)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise DataAbsent(f"{name} cannot be loaded ({one_line(error)})", how=how) from None


def _is_cached(hub: str) -> bool:
    """Whether the Hub's cache may hold a data set: it has one of this owner."""
    owner = hub.partition("/")[0]
    return any(Path(config.HF_DATASETS_CACHE).glob(f"{owner}___*"))


def load_word_list(folder: Path | None) -> list[str]:
    """All words of `words_alpha.txt(.gz)` in a folder, in its order: what the SpellingBee benchmark draws from.

    Raises:
        DataAbsent: the list is not there.
    """
    for path in [] if folder is None else [folder / f"{WORD_LIST}.gz", folder / WORD_LIST]:
        if path.exists():
            with open_text(path) as lines:
                return [line.strip() for line in lines]
    place = "no folder is given" if folder is None else f"it is not in {folder}"
    raise DataAbsent(
        f"the word list {WORD_LIST} is absent: {place}", how=f"curl -L -o {folder or '.'}/{WORD_LIST} {WORD_LIST_URL}"
    )


def task_messages(name: str, row: dict[str, Any]) -> Messages:
    """The conversation of a row of a known data set; it ends with the reference reply.

    Raises:
        UserError: the row is not of this data set.
    """
    # A stand-in may hold conversations as they are.
    if isinstance(row, BadRow) or (isinstance(row, dict) and "messages" in row):
        return convert_row(row)
    try:
        return _convert_task_row(name, row)
    except (KeyError, TypeError, IndexError) as error:
        raise UserError(
            f"the row has not the columns of {name} ({type(error).__name__}: {error}); give rows as on the Hub"
        ) from None


def _convert_task_row(name: str, row: dict[str, Any]) -> Messages:
    match name:
        case "ARC-Easy" | "ARC-Challenge":
            letters = row["choices"]["label"]
            return ask_multiple_choice(row["question"], letters, row["choices"]["text"], answer=row["answerKey"])
        case "MMLU":
            row = row.get("train", row)  # on the Hub, rows of auxiliary_train are wrapped once more
            return ask_multiple_choice(row["question"], LETTERS, row["choices"], answer=LETTERS[row["answer"]])
        case "GSM8K":
            return convert_gsm8k(row)
        case "HumanEval":
            return [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": f"{row['prompt']}\n{row['canonical_solution']}"},
            ]
    return convert_row(row)


def task_letters(name: str, row: dict[str, Any]) -> list[str]:
    """The letters a multiple choice row may be answered with."""
    return list(row["choices"]["label"] if name.startswith("ARC") else LETTERS)


def ask_multiple_choice(question: str, letters: Sequence[str], choices: Sequence[str], *, answer: str) -> Messages:
    """A multiple choice question, answered with a letter alone.

    The letter stands behind its choice with no space before it, so that it is the token of the answer.

    Source: karpathy/nanochat tasks/common.py@c75fe54, `render_mc`.
    """
    if answer not in letters:
        raise UserError(f"the answer '{answer}' is none of the letters {', '.join(letters)}; mend the row")
    if len(letters) != len(choices):
        raise UserError(f"there are {len(letters)} letters for {len(choices)} choices; mend the row")
    options = "".join(f"- {choice}={letter}\n" for letter, choice in zip(letters, choices, strict=True))
    prompt = f"Multiple Choice question: {question}\n{options}\nRespond only with the letter of the correct answer."
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def convert_gsm8k(row: dict[str, Any]) -> Messages:
    """GSM8K's annotations `<<12/60=0.2>>` as calculator calls with their results, the rest as text.

    Source: karpathy/nanochat tasks/gsm8k.py@c75fe54.
    """
    parts: list[dict[str, str]] = []
    for text in re.split(r"(<<[^>]+>>)", row["answer"]):
        if text.startswith("<<") and text.endswith(">>"):
            inside = text[2:-2]
            expression, equals, result = inside.rpartition("=")
            parts.append({"type": "python", "text": expression if equals else inside})
            parts.append({"type": "python_output", "text": result if equals else ""})
        else:
            parts.append({"type": "text", "text": text})
    return [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": parts}]

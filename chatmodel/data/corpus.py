"""Where do documents come from: the embedded corpus, a local folder or file, or the Hub?"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from chatmodel.data.embedded import SPLITS, describe_embedded_corpus, ensure_embedded_corpus
from chatmodel.data.files import FileFacts, describe_files, find_data_files, list_files
from chatmodel.data.hub import describe_hub, open_hub_split, parse_hub_name, with_revision
from chatmodel.data.shards import Selection, Shards, find_file_shards, local_shard
from chatmodel.runtime import UserError

logger = logging.getLogger("chatmodel")

EMBEDDED = "embedded"


def stream_documents(
    dataset: str, split: str, *, text_column: str = "text", on_bad_shard: str = "stop"
) -> Iterator[str]:
    """The documents of a data set, without empty ones, always in the same order.

    Args:
        dataset: "embedded"; a folder or file of parquet, jsonl, jsonl.gz, txt or txt.gz; or "owner/name" on the Hub,
            also with "@revision" and with ":configuration" behind it. What exists on the disk, or begins with . or /,
            is taken for local.
        split: "train" or "validation".
        on_bad_shard: "stop", "skip" or, for the Hub, "refetch"; see `Quarantine`.

    Raises:
        UserError: at once or while reading: the data set is missing, empty, damaged, unreachable, or has no such
            column.
    """
    documents = open_split(dataset, split, text_column=text_column)
    if isinstance(documents, Shards):
        return documents.read(on_bad_shard)
    if on_bad_shard != "stop":
        logger.warning("dataset %s is streamed: a part that cannot be read is asked for again, then it ends", dataset)
    return documents


def open_split(
    dataset: str, split: str, *, text_column: str = "text", listing: Iterable[FileFacts] | None = None
) -> Shards | Iterator[str]:
    """The files that hold a split, or its documents where they cannot be had as files.

    Args:
        listing: what the files of a local data set must be; see `list_corpus`.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is neither of {SPLITS}")
    if dataset == EMBEDDED:
        file = ensure_embedded_corpus() / f"{split}.parquet"
        return Shards((local_shard(file, file.name),), Selection(split, "text"))
    if is_hub_name(dataset):
        return open_hub_split(dataset, split, text_column=text_column)
    return find_file_shards(dataset, split, text_column=text_column, listing=listing or ())


def check_corpus(dataset: str, *, on_bad_shard: str = "stop") -> None:
    """Refuse at once what can be known to fail without reading anything; the Hub is not asked.

    Raises:
        UserError: a local data set is not there or holds nothing to read; or its files are to be fetched again.
    """
    if is_hub_name(dataset):
        return
    if on_bad_shard == "refetch":
        raise UserError("on_bad_shard 'refetch' is for data sets of the Hub; choose 'stop' or 'skip'")
    if dataset != EMBEDDED:
        find_data_files(dataset)


def list_corpus(dataset: str, *, known: Iterable[FileFacts] = ()) -> list[FileFacts] | None:
    """The files of a local data set with their sha256; None for others, which bring their own."""
    if dataset == EMBEDDED or is_hub_name(dataset):
        return None
    return list_files(dataset, known=known)


def describe_corpus(
    dataset: str, *, listing: Sequence[FileFacts] | None = None, ignore_damage: bool = False
) -> dict[str, Any]:
    """What the report says of a data set: `name`, `manifest` (a hash), and counts that cost nothing."""
    if dataset == EMBEDDED:
        return describe_embedded_corpus()
    if is_hub_name(dataset):
        return describe_hub(dataset)
    return describe_files(dataset, listing=listing, ignore_damage=ignore_damage)


def pin_revision(dataset: str, revision: str | None) -> str:
    """The name of a data set of the Hub in one state; other names stay as they are."""
    return with_revision(dataset, revision) if revision is not None and is_hub_name(dataset) else dataset


def is_hub_name(dataset: str) -> bool:
    """Whether a name has the form of a Hub name and is no path that exists."""
    repository = parse_hub_name(dataset).repository
    return not Path(dataset).exists() and not dataset.startswith((".", "/", "~")) and repository.count("/") == 1

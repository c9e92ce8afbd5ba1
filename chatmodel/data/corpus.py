"""Where do documents come from: the embedded corpus, a local folder or file, or the Hub?"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chatmodel.data.embedded import SPLITS, describe_embedded_corpus, ensure_embedded_corpus
from chatmodel.data.files import describe_files, read_texts, stream_files
from chatmodel.data.hub import describe_hub, stream_hub

EMBEDDED = "embedded"


def stream_documents(dataset: str, split: str, *, text_column: str = "text") -> Iterator[str]:
    """The documents of a data set, without empty ones, always in the same order.

    Args:
        dataset: "embedded"; a folder or file of parquet, jsonl, jsonl.gz, txt or txt.gz; or "owner/name" or
            "owner/name:configuration" on the Hub. What exists on the disk, or begins with . or /, is taken for local.
        split: "train" or "validation".

    Raises:
        UserError: while reading: the data set is missing, empty, damaged, unreachable, or has no such column.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is neither of {SPLITS}")
    if dataset == EMBEDDED:
        return read_texts(ensure_embedded_corpus() / f"{split}.parquet", text_column="text")
    if is_hub_name(dataset):
        return stream_hub(dataset, split, text_column=text_column)
    return stream_files(dataset, split, text_column=text_column)


def describe_corpus(dataset: str) -> dict[str, Any]:
    """What the report says of a data set: `name`, `manifest` (a hash), and counts that cost nothing."""
    if dataset == EMBEDDED:
        return describe_embedded_corpus()
    return describe_hub(dataset) if is_hub_name(dataset) else describe_files(dataset)


def is_hub_name(dataset: str) -> bool:
    """Whether a name has the form of a Hub name and is no path that exists."""
    return not Path(dataset).exists() and not dataset.startswith((".", "/", "~")) and dataset.count("/") == 1

"""How are documents had from a data set on the Hugging Face Hub, and which of them are for validation?"""

import errno
import hashlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import datasets.config
from datasets import DatasetBuilder, IterableDataset, load_dataset, load_dataset_builder
from huggingface_hub import HfApi, hf_hub_download, is_offline_mode
from huggingface_hub.hf_api import DatasetInfo

from chatmodel.data.files import SUFFIXES, missing_column, name_files, one_line
from chatmodel.data.shards import Selection, Shard, Shards
from chatmodel.runtime import UserError

logger = logging.getLogger("chatmodel")

VALIDATION_SHARE = 0.001  # of the documents, where validation has neither a split nor a file of its own
VALIDATION_SPLITS = ("validation", "valid", "val", "dev")
SHARD_FORMATS = ("parquet", "json")
# Files up to this size are fetched whole, kept in the Hub's cache, and read by all cores; larger ones, of which a run
# often needs the beginning only, are streamed.
MAX_FETCHED_BYTES = 2**30
MAX_ATTEMPTS = 6
FIRST_PAUSE = 2.0  # seconds; doubled with every failed attempt
RETRIED_STATUS = (408, 425, 429)  # of the 4xx, the only ones that another attempt can change


@dataclass(frozen=True)
class HubName:
    """ "owner/name", with "@revision" and ":configuration" behind it where they are given."""

    repository: str
    revision: str | None = None
    configuration: str | None = None

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return self.repository + revision + (f":{self.configuration}" if self.configuration else "")


def parse_hub_name(dataset: str) -> HubName:
    """The parts of a name."""
    rest, _, configuration = dataset.partition(":")
    repository, _, revision = rest.partition("@")
    return HubName(repository, revision or None, configuration or None)


def with_revision(dataset: str, revision: str) -> str:
    """The name of the same data set in one state."""
    return str(replace(parse_hub_name(dataset), revision=revision))


@dataclass(frozen=True)
class SplitFiles:
    """Where a split lies: in the files at `addresses`, or, where that is None, in the data set's split `name`.

    by_hash: whether its documents must still be picked out by hash.
    """

    name: str
    addresses: list[str] | None
    by_hash: bool


def open_builder(dataset: str) -> DatasetBuilder:
    """What `datasets` knows of a data set; it tries six times by itself, in silence.

    Raises:
        UserError: there is no such data set or configuration, or the Hub does not answer.
    """
    name = parse_hub_name(dataset)
    announce_question(dataset)
    try:
        return load_dataset_builder(name.repository, name.configuration, revision=name.revision)
    except (ConnectionError, TimeoutError) as error:
        raise UserError(
            f"dataset {dataset} is no local folder, and the Hub cannot be reached for it ({one_line(error)}); give a"
            " folder of parquet, jsonl or txt files, or --dataset embedded"
        ) from None
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"dataset {dataset} is no local folder, and cannot be opened from the Hub ({one_line(error)}); give"
            " another name (owner/name or owner/name:configuration), a folder, or --dataset embedded"
        ) from None


@cache
def announce_question(dataset: str) -> None:
    """Say once what is waited for, as half a minute passes before the Hub is given up."""
    if not is_offline_mode():
        logger.info("asking the Hub for dataset %s (for half a minute, if it does not answer)", dataset)


def open_hub_split(dataset: str, split: str, *, text_column: str) -> Shards | Iterator[str]:
    """The files of a split of a data set on the Hub, or its documents where they are streamed.

    Validation is the data set's own split; without one its last file (as in nanochat), and where it has but one file,
    0.1 % of its documents, chosen by hash.
    """
    builder = open_builder(dataset)
    files = find_split(builder, split)
    selection = Selection(split, text_column, VALIDATION_SHARE if files.by_hash else None)
    shards = find_hub_shards(parse_hub_name(dataset), builder, files)
    return Shards(shards, selection) if shards else stream_rows(dataset, open_stream(builder, files), selection)


def find_split(builder: DatasetBuilder, split: str) -> SplitFiles:
    """Where a split lies."""
    data_files = {str(name): sorted(map(str, files)) for name, files in (builder.config.data_files or {}).items()}
    splits = set(data_files) | set(builder.info.splits or {})
    own = next((name for name in VALIDATION_SPLITS if name in splits), None)
    if "train" not in splits and splits:
        raise UserError(
            f"dataset {builder.repo_id or builder.base_path} has no split 'train', only {', '.join(sorted(splits))}"
        )
    if own is not None:
        name = "train" if split == "train" else own
        return SplitFiles(name, data_files.get(name), by_hash=False)
    shards = data_files.get("train", [])
    if len(shards) < 2 or builder.name not in SHARD_FORMATS:
        return SplitFiles("train", shards or None, by_hash=True)
    return SplitFiles("train", shards[-1:] if split == "validation" else shards[:-1], by_hash=False)


def find_hub_shards(name: HubName, builder: DatasetBuilder, files: SplitFiles) -> tuple[Shard, ...] | None:
    """The files of a split, to be fetched one by one; None where they are of another kind, or large."""
    addresses = files.addresses or []
    if not addresses or not all(a.startswith("hf://") and a.endswith(SUFFIXES) for a in addresses):
        return None
    if builder.name not in SHARD_FORMATS:
        return None
    info = ask_for_files(name)
    pinned = replace(name, revision=info.sha)
    contents = {file.rfilename: file for file in info.siblings}
    shards = []
    for path in map(path_in_repository, addresses):
        file = contents.get(path)
        if file is None or file.size is None or file.size > MAX_FETCHED_BYTES:
            return None
        sha256 = file.lfs.sha256 if file.lfs else None
        shards.append(Shard(path, file.size, partial(fetch_file, pinned, path), sha256, remote=True))
    return tuple(shards)


def fetch_file(name: HubName, path: str, again: bool) -> Path:
    """A file of a data set, in the Hub's cache on this machine; `again` replaces one that lies there.

    Raises:
        UserError: it cannot be had.
    """
    failures = 0
    while True:
        try:
            return Path(
                hf_hub_download(
                    name.repository, path, repo_type="dataset", revision=name.revision, force_download=again
                )
            )
        except Exception as error:  # HTTP, xet and file system libraries each raise their own
            failures += 1
            wait_before_retry(error, failures, f"fetching {path} of dataset {name}")


def wait_before_retry(error: Exception, failures: int, what: str) -> None:
    """Wait twice as long with every failure.

    Raises:
        UserError: these were enough, or another attempt changes nothing.
    """
    status = getattr(getattr(error, "response", None), "status_code", None)
    refused = status is not None and 400 <= status < 500 and status not in RETRIED_STATUS
    final = refused or getattr(error, "errno", None) == errno.ENOSPC
    if final or failures == MAX_ATTEMPTS:
        times = "" if final else f" {failures} times in a row"
        raise UserError(
            f"{what} from the Hub failed{times} ({one_line(error)}); start again later, or give a folder of its files"
        ) from error
    pause = FIRST_PAUSE * 2 ** (failures - 1)
    logger.warning("%s failed (%s); trying again in %.0f s", what, one_line(error), pause)
    time.sleep(pause)


def open_stream(builder: DatasetBuilder, files: SplitFiles) -> IterableDataset:
    """The stream that holds a split."""
    # Its own twenty attempts, each with five inside, would multiply ours to an hour of silence.
    datasets.config.STREAMING_READ_MAX_RETRIES = 1
    whole = sorted(map(str, (builder.config.data_files or {}).get(files.name, [])))
    if files.addresses is None or files.addresses == whole:
        return builder.as_streaming_dataset(files.name)
    return load_dataset(builder.name, data_files={files.name: files.addresses}, split=files.name, streaming=True)


def stream_rows(dataset: str, stream: IterableDataset, selection: Selection) -> Iterator[str]:
    """The documents of a stream; a broken connection is taken up where it broke."""
    column = selection.text_column
    for row in resume_on_failure(stream, dataset):
        if column not in row:
            raise UserError(missing_column(f"dataset {dataset}", column, list(row)))
        text = row[column]
        if text is not None and not isinstance(text, str):
            raise UserError(f"column '{column}' of dataset {dataset} holds {type(text).__name__}, not text")
        if text and selection.keeps(text):
            yield text


def resume_on_failure(stream: IterableDataset, dataset: str) -> Iterator[dict[str, Any]]:
    """The rows of a stream; after a failure it continues behind the last row it gave."""
    failures = 0
    rows = iter(stream)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:  # HTTP, file system and decompression libraries each raise their own
            failures += 1
            wait_before_retry(error, failures, f"reading dataset {dataset}")
            stream.load_state_dict(stream.state_dict())
            rows = iter(stream)
        else:
            failures = 0
            yield row


def ask_for_files(name: HubName) -> DatasetInfo:
    """The files of a data set, with sizes and digests, and the revision they are of.

    Raises:
        UserError: the Hub does not say.
    """
    try:
        return HfApi().dataset_info(name.repository, revision=name.revision, files_metadata=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"the files of dataset {name} cannot be listed on the Hub ({one_line(error)}); start again later, or"
            " give a folder of its files"
        ) from None


def describe_hub(dataset: str) -> dict[str, Any]:
    """Name, manifest hash (over names, sizes and digests of the data files), and what else is known for nothing."""
    builder = open_builder(dataset)
    addresses = [str(address) for files in (builder.config.data_files or {}).values() for address in files]
    info = ask_for_files(parse_hub_name(dataset))
    contents = {file.rfilename: (file.size, file.lfs.sha256 if file.lfs else file.blob_id) for file in info.siblings}
    manifest = hashlib.sha256()
    for path in sorted(map(path_in_repository, addresses)):
        size, digest = contents.get(path, (None, info.sha))
        manifest.update(f"{path}\t{size}\t{digest}\n".encode())
    description: dict[str, Any] = {
        "name": dataset,
        "manifest": manifest.hexdigest(),
        "revision": info.sha,
        "files": len(addresses),
        "validation": describe_validation(find_split(builder, "validation")),
    }
    if builder.info.splits:
        description["documents"] = sum(split.num_examples for split in builder.info.splits.values())
    return description


def describe_validation(files: SplitFiles) -> str:
    """Which documents are for validation."""
    if files.by_hash:
        return f"{VALIDATION_SHARE:.1%} of the documents, by hash"
    if files.addresses is None:
        return f"split {files.name}"
    return name_files([path_in_repository(address) for address in files.addresses])


def path_in_repository(address: str) -> str:
    """The path in "hf://datasets/owner/name@revision/path"."""
    return address.partition("@")[2].partition("/")[2] or address

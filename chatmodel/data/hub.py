"""How are documents streamed from a data set on the Hugging Face Hub, and which of them are for validation?"""

import hashlib
import logging
import time
from collections.abc import Iterator
from typing import Any

from datasets import DatasetBuilder, IterableDataset, load_dataset, load_dataset_builder
from huggingface_hub import HfApi

from chatmodel.data.files import is_validation, missing_column, one_line
from chatmodel.runtime import UserError

logger = logging.getLogger("chatmodel")

VALIDATION_SHARE = 0.001  # of the documents, where validation has neither a split nor a file of its own
VALIDATION_SPLITS = ("validation", "valid", "val", "dev")
SHARD_FORMATS = ("parquet", "json")
MAX_ATTEMPTS = 6
FIRST_PAUSE = 2.0  # seconds; doubled with every failed attempt


def open_builder(dataset: str) -> DatasetBuilder:
    """What `datasets` knows of "owner/name" or "owner/name:configuration"; it retries by itself.

    Raises:
        UserError: there is no such data set or configuration, or the Hub does not answer.
    """
    name, _, configuration = dataset.partition(":")
    try:
        return load_dataset_builder(name, configuration or None)
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


def stream_hub(dataset: str, split: str, *, text_column: str) -> Iterator[str]:
    """The documents of a split of a data set on the Hub; a broken connection is taken up where it broke.

    Validation is the data set's own split; without one its last file (as in nanochat), and where it has but one file,
    0.1 % of its documents, chosen by hash.
    """
    stream, by_hash = open_stream(open_builder(dataset), split)
    for row in resume_on_failure(stream, dataset):
        if text_column not in row:
            raise UserError(missing_column(f"dataset {dataset}", text_column, list(row)))
        text = row[text_column]
        if text is not None and not isinstance(text, str):
            raise UserError(f"column '{text_column}' of dataset {dataset} holds {type(text).__name__}, not text")
        if text and (not by_hash or is_validation(text, share=VALIDATION_SHARE) == (split == "validation")):
            yield text


def open_stream(builder: DatasetBuilder, split: str) -> tuple[IterableDataset, bool]:
    """The stream that holds a split, and whether its documents must still be divided by hash."""
    data_files = {str(name): sorted(map(str, files)) for name, files in (builder.config.data_files or {}).items()}
    splits = set(data_files) | set(builder.info.splits or {})
    own = next((name for name in VALIDATION_SPLITS if name in splits), None)
    if "train" not in splits and splits:
        raise UserError(
            f"dataset {builder.repo_id or builder.base_path} has no split 'train', only {', '.join(sorted(splits))}"
        )
    if own is not None:
        return builder.as_streaming_dataset("train" if split == "train" else own), False
    shards = data_files.get("train", [])
    if len(shards) < 2 or builder.name not in SHARD_FORMATS:
        return builder.as_streaming_dataset("train"), True
    chosen = shards[-1:] if split == "validation" else shards[:-1]
    return load_dataset(builder.name, data_files={split: chosen}, split=split, streaming=True), False


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
            if failures == MAX_ATTEMPTS:
                raise UserError(
                    f"reading dataset {dataset} from the Hub failed {failures} times in a row ({one_line(error)});"
                    " start again later, or give a folder of its files"
                ) from error
            pause = FIRST_PAUSE * 2 ** (failures - 1)
            logger.warning("reading dataset %s failed (%s); trying again in %.0f s", dataset, one_line(error), pause)
            time.sleep(pause)
            stream.load_state_dict(stream.state_dict())
            rows = iter(stream)
        else:
            failures = 0
            yield row


def describe_hub(dataset: str) -> dict[str, Any]:
    """Name, manifest hash (over names, sizes and digests of the data files), and documents where they are known."""
    builder = open_builder(dataset)
    addresses = [str(address) for files in (builder.config.data_files or {}).values() for address in files]
    try:
        info = HfApi().dataset_info(dataset.partition(":")[0], files_metadata=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"the files of dataset {dataset} cannot be listed on the Hub ({one_line(error)}); start again later, or"
            " give a folder of its files"
        ) from None
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
    }
    if builder.info.splits:
        description["documents"] = sum(split.num_examples for split in builder.info.splits.values())
    return description


def path_in_repository(address: str) -> str:
    """The path in "hf://datasets/owner/name@revision/path"."""
    return address.partition("@")[2].partition("/")[2] or address

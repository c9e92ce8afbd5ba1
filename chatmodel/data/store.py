"""How is a data set kept as token ids on disk, so that training never tokenizes and every number can be traced?"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from chatmodel.data.checksums import BLOCK_BYTES, find_damaged_block, hash_blocks
from chatmodel.data.corpus import describe_corpus, is_hub_name, list_corpus, open_split, pin_revision
from chatmodel.data.encoding import Encoder
from chatmodel.data.files import FileFacts
from chatmodel.data.packing import Span
from chatmodel.data.shards import Quarantine, Shards
from chatmodel.data.writing import OFFSETS_FILE, TOKENS_FILE, ShardsWriter, TokenWriter, write_texts
from chatmodel.runs import publish_folder
from chatmodel.runtime import UserError, read_json, write_json

logger = logging.getLogger("chatmodel")

MANIFEST_FILE = "manifest.json"
CHECKSUMS_FILE = "checksums.json"
LISTING_FILE = "sources.json"  # beside the stores: the files of a local data set as they were when last seen


@dataclass(frozen=True)
class TokenStore:
    """The documents of a split as token ids, each beginning with `<|bos|>`, one after the other.

    tokens: (num_tokens,) uint16 or uint32, mapped from disk.
    offsets: (num_documents + 1,) int64; document i is tokens[offsets[i]:offsets[i + 1]].
    """

    folder: Path
    manifest: dict[str, Any]
    tokens: NDArray[np.unsignedinteger[Any]]
    offsets: NDArray[np.int64]

    @property
    def num_tokens(self) -> int:
        """All tokens, the `<|bos|>` of every document included."""
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        """Documents in the store."""
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(num_documents,) tokens of each document."""
        return np.diff(self.offsets)

    @cached_property
    def _descriptor(self) -> int:
        descriptor = os.open(self.folder / TOKENS_FILE, os.O_RDONLY)
        weakref.finalize(self, os.close, descriptor)
        return descriptor

    def read_spans(self, spans: Sequence[Span]) -> NDArray[np.unsignedinteger[Any]]:
        """The tokens of some spans, one after the other, read from the file.

        As fast as from the map, but a disk that fails is an error, where the map would end the process, and one that
        hangs stops only this thread.

        Raises:
            UserError: the file cannot be read, or has become shorter.
        """
        width = self.tokens.itemsize
        try:
            parts = [os.pread(self._descriptor, (stop - start) * width, start * width) for start, stop in spans]
        except OSError as error:
            raise UserError(
                f"{self.folder / TOKENS_FILE} cannot be read ({error.strerror}); check the disk, then start again"
            ) from None
        content = b"".join(parts)
        if len(content) != sum(stop - start for start, stop in spans) * width:
            raise UserError(f"{self.folder / TOKENS_FILE} has been cut short; {how_to_mend(self.folder)}")
        return np.frombuffer(content, dtype=self.tokens.dtype)

    @classmethod
    def open(cls, folder: Path, *, check_hash: bool = False) -> "TokenStore":
        """Map a store that `build_token_store` wrote.

        Args:
            check_hash: read everything and compare it with the checksums, on all cores.

        Raises:
            UserError: it is not there, or a file is damaged or has another size than the manifest says.
        """
        manifest = read_json(folder / MANIFEST_FILE)
        dtype = np.dtype(manifest["dtype"])
        check_size(folder / TOKENS_FILE, manifest["tokens"] * dtype.itemsize)
        check_size(folder / OFFSETS_FILE, (manifest["documents"] + 1) * 8)
        if check_hash:
            check_contents(folder)
        # The view as a plain array makes slices many times cheaper than those of np.memmap.
        tokens = np.memmap(folder / TOKENS_FILE, dtype=dtype, mode="r").view(np.ndarray)
        return cls(folder, manifest, tokens, np.fromfile(folder / OFFSETS_FILE, dtype=np.int64))


def check_size(file: Path, expected: int) -> None:
    """Raise a `UserError` unless a file of a store is there and whole."""
    size = file.stat().st_size if file.is_file() else 0
    if size != expected:
        raise UserError(
            f"{file} is cut short or damaged ({size} bytes instead of {expected}); {how_to_mend(file.parent)}"
        )


def check_contents(folder: Path) -> None:
    """Raise a `UserError` unless the files of a store are what was written."""
    if not (folder / CHECKSUMS_FILE).is_file():
        raise UserError(f"{folder} has no {CHECKSUMS_FILE} to be checked against; {how_to_mend(folder)}")
    checksums = read_json(folder / CHECKSUMS_FILE)
    for name in (TOKENS_FILE, OFFSETS_FILE):
        number = find_damaged_block(folder / name, checksums[name], block_bytes=checksums["block_bytes"])
        if number is not None:
            raise UserError(
                f"{folder / name} is damaged (block {number} of {len(checksums[name])} has another sha256 than when it"
                f" was written); {how_to_mend(folder)}"
            )


def how_to_mend(folder: Path) -> str:
    """What to do about a store that is of no use."""
    return f"delete {folder} and start again, the store is then made anew"


def hash_tokenizer(tokenizer: PreTrainedTokenizerFast) -> str:
    """Names a tokenizer by what decides its ids; truncation and padding, which callers switch on and off, do not."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    for key in ("truncation", "padding"):
        content.pop(key, None)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def build_token_store(
    documents: Iterable[str] | Shards,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    *,
    dataset: dict[str, Any],
    split: str,
    max_tokens: int | None = None,
    num_workers: int | None = None,
    on_bad_shard: str = "stop",
) -> TokenStore:
    """Encode documents into `folder`, which is written aside and renamed, so that it is whole or absent.

    The last document is cut where `max_tokens` is reached. In the manifest, `bytes` counts the UTF-8 bytes of the text
    that the tokens stand for, `exhausted` tells that no document was left out, and `bad_shards` lists the files that
    could not be read. The checksums of all files, read and written, are in `checksums.json`.

    Args:
        dataset: what `describe_corpus` says; kept in the manifest.
        num_workers: that encode; by default as many as there are cores.
        on_bad_shard: see `Quarantine`.

    Raises:
        UserError: there is no document, `max_tokens` is not positive, or a file is damaged and the policy is to stop.
    """
    if max_tokens is not None and max_tokens < 1:
        raise UserError(f"the token store of split {split} cannot hold {max_tokens} tokens; ask for at least 1")
    aside = make_folder_beside(folder)
    try:
        writer = TokenWriter(aside, Encoder(tokenizer), max_tokens=max_tokens)
        sources: list[dict[str, Any]] = []
        bad_shards: list[dict[str, Any]] = []
        if isinstance(documents, Shards):
            quarantine = Quarantine(on_bad_shard, documents.files, bad_shards)
            shards_writer = ShardsWriter(documents, writer, quarantine, split, num_workers)
            exhausted = shards_writer.write()
            sources = shards_writer.sources
        else:
            exhausted = write_texts(documents, writer, split=split, num_workers=num_workers)
        counts = writer.finish()
        if counts["documents"] == 0:
            raise UserError(
                f"dataset {dataset['name']} has no documents for the split '{split}'; give more text, or a folder with"
                " at least two shards, of which the last is for validation"
            )
        manifest = {
            "split": split,
            "dataset": dataset,
            "tokenizer": hash_tokenizer(tokenizer),
            "max_tokens": max_tokens,
            "exhausted": exhausted,
            "bad_shards": bad_shards,
        }
        write_json(aside / MANIFEST_FILE, manifest | counts)
        checksums = {name: hash_blocks(aside / name) for name in (TOKENS_FILE, OFFSETS_FILE)}
        write_json(aside / CHECKSUMS_FILE, {"block_bytes": BLOCK_BYTES, **checksums, "sources": sources})
        aside.chmod(0o755)
        publish_folder(aside, folder)
    except OSError as error:
        raise cannot_write(folder, error) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return TokenStore.open(folder)


def make_folder_beside(folder: Path) -> Path:
    """An empty folder in the same place, from which a rename is atomic."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise cannot_write(folder, error) from None


def cannot_write(folder: Path, error: OSError) -> UserError:
    """The error about a disk that takes no store."""
    return UserError(
        f"the token store {folder} cannot be written ({error.strerror or error}); free space there or choose another"
        " --run_dir, then start again"
    )


def ensure_token_store(
    dataset: str,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    *,
    max_train_tokens: int,
    max_validation_tokens: int | None = None,
    text_column: str = "text",
    rebuild: bool = False,
    on_bad_shard: str = "stop",
    check_hash: bool = True,
) -> tuple[TokenStore, TokenStore]:
    """The stores `folder`/train and `folder`/validation, each opened where it fits and built where there is none.

    A store fits when it was made from this data set with this tokenizer, and holds enough tokens or all there are.

    Args:
        rebuild: make a store that does not fit anew; right as long as nothing was trained on it.
        on_bad_shard: what is done about a file that cannot be read: "stop", "skip" or "refetch"; see `Quarantine`.
        check_hash: compare all of a store that is there with its checksums.

    Raises:
        UserError: a store does not fit or is damaged, and `rebuild` is not set; or the data set cannot be read.
    """
    listing = list_corpus(dataset, known=read_listing(folder))
    facts = describe_or_recall(dataset, folder, listing=listing, ignore_damage=on_bad_shard != "stop")
    facts |= {"text_column": text_column}
    limits = {"train": max_train_tokens, "validation": max_validation_tokens}
    stores = []
    for split, max_tokens in limits.items():
        place = folder / split
        store = reuse_store(place, facts, tokenizer, max_tokens=max_tokens, rebuild=rebuild, check_hash=check_hash)
        if store is None:
            # The state that was described, also if the Hub has another one by now.
            pinned = pin_revision(dataset, facts.get("revision"))
            store = build_token_store(
                open_split(pinned, split, text_column=text_column, listing=listing),
                tokenizer,
                place,
                dataset=facts,
                split=split,
                max_tokens=max_tokens,
                on_bad_shard=on_bad_shard,
            )
        stores.append(store)
    if listing and listing != read_listing(folder):
        write_json(folder / LISTING_FILE, {"dataset": dataset, "files": listing})
    return stores[0], stores[1]


def read_listing(folder: Path) -> list[FileFacts]:
    """The files of the data set as they were when the stores were made or last checked."""
    file = folder / LISTING_FILE
    return read_json(file)["files"] if file.is_file() else []


def describe_or_recall(
    dataset: str, folder: Path, *, listing: list[FileFacts] | None, ignore_damage: bool
) -> dict[str, Any]:
    """What is known of the data set; where the Hub does not answer, what the store's manifest says of it."""
    try:
        return describe_corpus(dataset, listing=listing, ignore_damage=ignore_damage)
    except UserError as error:
        manifest = folder / "train" / MANIFEST_FILE
        recalled = read_json(manifest)["dataset"] if manifest.is_file() and is_hub_name(dataset) else {}
        if recalled.get("name") != dataset:
            raise
        logger.warning("%s: its token store in %s is used unchecked", error, folder)
        return recalled


def reuse_store(
    folder: Path,
    dataset: dict[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    *,
    max_tokens: int | None,
    rebuild: bool,
    check_hash: bool,
) -> TokenStore | None:
    """The store in `folder` if it fits; None if it is to be built."""
    if not folder.exists():
        return None
    try:
        store = TokenStore.open(folder)
        unfit = find_mismatch(store, dataset, tokenizer, max_tokens)
        if unfit is not None:
            raise UserError(
                f"the token store {folder} {unfit}; delete {folder.parent} to make it anew, or choose another"
                " --run_dir"
            )
        if check_hash:
            check_contents(folder)
    except UserError as error:
        if not rebuild:
            raise
        logger.info("making the token store anew: %s", error)
        return None
    for bad in store.manifest.get("bad_shards", []):
        if bad["skipped"]:
            logger.warning("the token store %s was made without %s: %s", folder, bad["name"], bad["reason"])
    return store


def find_mismatch(
    store: TokenStore, dataset: dict[str, Any], tokenizer: PreTrainedTokenizerFast, max_tokens: int | None
) -> str | None:
    """Why a store cannot be used, as the rest of a sentence; None if it can."""
    made_from = store.manifest["dataset"]
    if made_from["manifest"] != dataset["manifest"] or made_from["text_column"] != dataset["text_column"]:
        if made_from["name"] != dataset["name"]:
            return f"was made from dataset {made_from['name']}, not from {dataset['name']}"
        return f"was made from an earlier state of dataset {made_from['name']}{describe_change(made_from, dataset)}"
    if not has_tokenizer(store, tokenizer):
        return "was made with another tokenizer"
    if not store.manifest["exhausted"] and (max_tokens is None or store.manifest["max_tokens"] < max_tokens):
        asked = "all there are" if max_tokens is None else f"{max_tokens:,}"
        return f"holds {store.num_tokens:,} tokens, but {asked} are asked for"
    return None


def has_tokenizer(store: TokenStore, tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether a store was made with this tokenizer."""
    return bool(store.manifest["tokenizer"] == hash_tokenizer(tokenizer))


def check_tokenizer(store: TokenStore, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raise a `UserError` unless a store was made with this tokenizer."""
    if not has_tokenizer(store, tokenizer):
        raise UserError(
            f"the token store {store.folder} was made with another tokenizer; delete it and make it anew with "
            "scripts/prepare_data.py"
        )


def describe_change(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What is different about a data set, in brackets; nothing where only contents are."""
    keys = ("revision", "validation", "files", "bytes", "text_column")
    changes = [f"{key} was {before.get(key)}, is {now.get(key)}" for key in keys if before.get(key) != now.get(key)]
    return f" ({'; '.join(changes)})" if changes else ""

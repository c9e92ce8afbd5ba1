"""How is a data set kept as token ids on disk, so that training never tokenizes and every number can be traced?"""

import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from tiktoken import Encoding
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from chatmodel.data.corpus import describe_corpus, is_hub_name, stream_documents
from chatmodel.runs import publish_folder
from chatmodel.runtime import UserError, read_json, write_json
from chatmodel.tokenizer import build_encoding

logger = logging.getLogger("chatmodel")

TOKENS_FILE = "tokens.bin"
OFFSETS_FILE = "offsets.bin"
MANIFEST_FILE = "manifest.json"
BATCH_CHARS = 200_000  # text that a thread encodes at a time

Encoded = tuple[NDArray[np.uint32], int]  # the ids of a document, and the UTF-8 bytes of its text


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

    @classmethod
    def open(cls, folder: Path, *, check_hash: bool = False) -> "TokenStore":
        """Map a store that `build_token_store` wrote.

        Args:
            check_hash: read all tokens and compare their sha256 with the manifest's.

        Raises:
            UserError: it is not there, or a file is damaged or has another size than the manifest says.
        """
        manifest = read_json(folder / MANIFEST_FILE)
        dtype = np.dtype(manifest["dtype"])
        check_size(folder / TOKENS_FILE, manifest["tokens"] * dtype.itemsize)
        check_size(folder / OFFSETS_FILE, (manifest["documents"] + 1) * 8)
        if check_hash and hash_tokens(folder / TOKENS_FILE) != manifest["sha256"]:
            raise UserError(
                f"{folder / TOKENS_FILE} is damaged (its sha256 is not the manifest's); {how_to_mend(folder)}"
            )
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


def how_to_mend(folder: Path) -> str:
    """What to do about a store that is of no use."""
    return f"delete {folder} and start again, the store is then made anew"


def hash_tokens(file: Path) -> str:
    """The sha256 of the tokens as they lie on disk."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def hash_tokenizer(tokenizer: PreTrainedTokenizerFast) -> str:
    """Names a tokenizer by what decides its ids; truncation and padding, which callers switch on and off, do not."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    for key in ("truncation", "padding"):
        content.pop(key, None)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def build_token_store(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    *,
    dataset: dict[str, Any],
    split: str,
    max_tokens: int | None = None,
    num_threads: int | None = None,
) -> TokenStore:
    """Encode documents into `folder`, which is written aside and renamed, so that it is whole or absent.

    The last document is cut where `max_tokens` is reached. `bytes` in the manifest counts the UTF-8 bytes of the text
    that the tokens stand for.

    Args:
        dataset: what `describe_corpus` says; kept in the manifest.
        num_threads: of the tokenizer; by default as many as there are cores.

    Raises:
        UserError: there is no document, or `max_tokens` is not positive.
    """
    if max_tokens is not None and max_tokens < 1:
        raise UserError(f"the token store of split {split} cannot hold {max_tokens} tokens; ask for at least 1")
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        writer = TokenWriter(aside, tokenizer, max_tokens=max_tokens)
        with tqdm(desc=f"tokens, {split}", unit="B", unit_scale=True, disable=None) as progress:
            counts = writer.write(documents, num_threads=num_threads or os.cpu_count() or 1, progress=progress)
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
        }
        write_json(aside / MANIFEST_FILE, manifest | counts)
        aside.chmod(0o755)
        publish_folder(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return TokenStore.open(folder)


class TokenWriter:
    """Appends documents to the two files of a store, and counts and hashes what it writes."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerFast, *, max_tokens: int | None) -> None:
        self.folder = folder
        self.encoding = build_encoding(tokenizer)
        self.dtype = np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)
        self.bos = np.array([tokenizer.bos_token_id], dtype=self.dtype)
        self.max_tokens = sys.maxsize if max_tokens is None else max_tokens
        self.lengths: list[int] = []
        self.num_tokens = 0
        self.num_bytes = 0
        self.digest = hashlib.sha256()

    def write(self, documents: Iterable[str], *, num_threads: int, progress: tqdm) -> dict[str, Any]:
        """Write documents until they end or `max_tokens` is reached; returns what the manifest says of them.

        `exhausted` tells that no document was left out.
        """
        exhausted = True
        with (self.folder / TOKENS_FILE).open("wb") as file:
            for batch in encode_documents(documents, self.encoding, num_threads=num_threads):
                before = self.num_bytes
                whole = self._append(file, batch)
                progress.update(self.num_bytes - before)
                if not whole or self.num_tokens == self.max_tokens:
                    exhausted = False
                    break
        np.cumsum([0, *self.lengths], dtype=np.int64).tofile(self.folder / OFFSETS_FILE)
        return {
            "documents": len(self.lengths),
            "tokens": self.num_tokens,
            "bytes": self.num_bytes,
            "exhausted": exhausted,
            "dtype": self.dtype.name,
            "sha256": self.digest.hexdigest(),
        }

    def _append(self, file: BinaryIO, batch: list[Encoded]) -> bool:
        """Write some documents; False when some of it was left out."""
        parts: list[NDArray[Any]] = []
        whole = True
        for ids, num_bytes in batch:
            room = self.max_tokens - self.num_tokens - 1
            whole = len(ids) <= room
            if room < 1:  # a lone <|bos|> says nothing
                break
            if not whole:
                ids = ids[:room]
                num_bytes = len(self.encoding.decode_bytes(ids.tolist()))
            parts += [self.bos, ids.astype(self.dtype)]
            self.lengths.append(len(ids) + 1)
            self.num_tokens += len(ids) + 1
            self.num_bytes += num_bytes
            if not whole:
                break
        block = np.concatenate([self.bos[:0], *parts]).tobytes()
        self.digest.update(block)
        file.write(block)
        return whole


def encode_documents(documents: Iterable[str], encoding: Encoding, *, num_threads: int) -> Iterator[list[Encoded]]:
    """Documents that are not empty, encoded by threads (tiktoken frees the interpreter lock), in order, in batches."""
    pool = ThreadPoolExecutor(num_threads)
    pending: deque[Future[list[Encoded]]] = deque()
    try:
        for texts in batch_texts(documents):
            pending.append(pool.submit(encode_texts, texts, encoding))
            if len(pending) > 2 * num_threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def encode_texts(texts: list[str], encoding: Encoding) -> list[Encoded]:
    """The ids of each text, control tokens in it read as text, and its bytes."""
    encoded = []
    for text in texts:
        try:
            # Unlike encode_ordinary it makes no Python list, which threads would make one after the other.
            ids = encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:  # a lone surrogate: encode_ordinary replaces it by U+FFFD, as long in bytes
            ids = np.array(encoding.encode_ordinary(text), dtype=np.uint32)
        encoded.append((ids, len(text.encode("utf-8", "surrogatepass"))))
    return encoded


def batch_texts(documents: Iterable[str]) -> Iterator[list[str]]:
    """Documents that are not empty, in lists of about `BATCH_CHARS` characters."""
    batch: list[str] = []
    size = 0
    for document in documents:
        if document:
            batch.append(document)
            size += len(document)
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def ensure_token_store(
    dataset: str,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    *,
    max_train_tokens: int,
    max_validation_tokens: int | None = None,
    text_column: str = "text",
    rebuild: bool = False,
) -> tuple[TokenStore, TokenStore]:
    """The stores `folder`/train and `folder`/validation, each opened where it fits and built where there is none.

    A store fits when it was made from this data set with this tokenizer, and holds enough tokens or all there are.

    Args:
        rebuild: make a store that does not fit anew; right as long as nothing was trained on it.

    Raises:
        UserError: a store does not fit or is damaged, and `rebuild` is not set; or the data set cannot be read.
    """
    dataset_facts = describe_or_recall(dataset, folder) | {"text_column": text_column}
    limits = {"train": max_train_tokens, "validation": max_validation_tokens}
    stores = []
    for split, max_tokens in limits.items():
        place = folder / split
        store = reuse_store(place, dataset_facts, tokenizer, max_tokens=max_tokens, rebuild=rebuild)
        if store is None:
            store = build_token_store(
                stream_documents(dataset, split, text_column=text_column),
                tokenizer,
                place,
                dataset=dataset_facts,
                split=split,
                max_tokens=max_tokens,
            )
        stores.append(store)
    return stores[0], stores[1]


def describe_or_recall(dataset: str, folder: Path) -> dict[str, Any]:
    """What is known of the data set; where the Hub does not answer, what the store's manifest says of it."""
    try:
        return describe_corpus(dataset)
    except UserError as error:
        manifest = folder / "train" / MANIFEST_FILE
        recalled = read_json(manifest)["dataset"] if manifest.is_file() and is_hub_name(dataset) else {}
        if recalled.get("name") != dataset:
            raise
        logger.warning("%s: its token store in %s is used unchecked", error, folder)
        return recalled


def reuse_store(
    folder: Path, dataset: dict[str, Any], tokenizer: PreTrainedTokenizerFast, *, max_tokens: int | None, rebuild: bool
) -> TokenStore | None:
    """The store in `folder` if it fits; None if it is to be built."""
    if not folder.exists():
        return None
    try:
        store = TokenStore.open(folder)
        unfit = find_mismatch(store, dataset, tokenizer, max_tokens)
        if unfit is None:
            return store
        raise UserError(
            f"the token store {folder} {unfit}; delete {folder.parent} to make it anew, or choose another --run_dir"
        )
    except UserError as error:
        if not rebuild:
            raise
        logger.info("making the token store anew: %s", error)
        return None


def find_mismatch(
    store: TokenStore, dataset: dict[str, Any], tokenizer: PreTrainedTokenizerFast, max_tokens: int | None
) -> str | None:
    """Why a store cannot be used, as the rest of a sentence; None if it can."""
    made_from = store.manifest["dataset"]
    if made_from["manifest"] != dataset["manifest"] or made_from["text_column"] != dataset["text_column"]:
        same_name = made_from["name"] == dataset["name"]
        return f"was made from {'an earlier state of ' if same_name else ''}dataset {made_from['name']}" + (
            "" if same_name else f", not from {dataset['name']}"
        )
    if store.manifest["tokenizer"] != hash_tokenizer(tokenizer):
        return "was made with another tokenizer"
    if not store.manifest["exhausted"] and (max_tokens is None or store.manifest["max_tokens"] < max_tokens):
        asked = "all there are" if max_tokens is None else f"{max_tokens:,}"
        return f"holds {store.num_tokens:,} tokens, but {asked} are asked for"
    return None

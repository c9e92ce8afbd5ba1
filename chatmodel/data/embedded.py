"""Which text is there when no data set is given? The documentation of what is installed, cleaned, cached on disk."""

import gc
import hashlib
import importlib.metadata
import json
import logging
import multiprocessing
import os
import platform
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from chatmodel.data.documentation import (
    MIN_DOCUMENT_WORDS,
    STANDARD_LIBRARY,
    SourceFile,
    find_files,
    read_documents,
    read_topics,
)
from chatmodel.data.duplicates import remove_near_duplicates
from chatmodel.runs import publish_folder
from chatmodel.runtime import UserError, read_json, write_json

logger = logging.getLogger("chatmodel")

# Distributions with much or with varied prose, out of what our dependencies install; the missing ones are left out.
# Not among them: lm_eval, whose files quote benchmarks.
TRAIN_PACKAGES = (
    STANDARD_LIBRARY,
    *("torch", "scipy", "sympy", "transformers", "numpy", "scikit-learn", "pandas", "matplotlib", "networkx", "nltk"),
    *("fonttools", "peft", "trl", "datasets", "pydantic", "portalocker", "pillow", "narwhals", "pyparsing", "lxml"),
    *("more-itertools", "pyarrow", "aiohttp", "anyio", "yarl", "urllib3", "requests", "python-dateutil", "sacrebleu"),
    *("packaging", "attrs", "filelock", "markdown", "pygments", "absl-py", "regex", "tqdm", "psutil", "dill"),
)
VALIDATION_PACKAGES = ("huggingface_hub", "mpmath", "accelerate", "fsspec", "click", "jinja2", "rich", "joblib")
BUILDER_FILES = ("prose.py", "documentation.py", "duplicates.py", "embedded.py")
SPLITS = ("train", "validation")
MIN_PARALLEL_FILES = 200  # below this, starting processes costs more than it saves
MAX_WORKERS = 8
ROW_GROUP_DOCUMENTS = 1_024


@dataclass(frozen=True)
class Document:
    """A text, the package it comes from and the split it belongs to."""

    text: str
    source: str
    split: str


def ensure_embedded_corpus(
    *,
    train_packages: tuple[str, ...] = TRAIN_PACKAGES,
    validation_packages: tuple[str, ...] = VALIDATION_PACKAGES,
    cache: Path | None = None,
) -> Path:
    """The folder of the embedded corpus (train.parquet, validation.parquet, manifest.json), built at the first call.

    Args:
        cache: where such folders lie; default `$XDG_CACHE_HOME/chatmodel` or `~/.cache/chatmodel`.

    Raises:
        UserError: the cache cannot be written, or too few packages are installed to learn or to validate from.
    """
    packages = dict.fromkeys(train_packages, "train") | dict.fromkeys(validation_packages, "validation")
    versions = find_versions(packages)
    splits = {package: packages[package] for package in versions}
    folder = (cache or default_cache()) / f"embedded-{corpus_key(versions, splits)}"
    if not is_complete(folder):
        build_corpus(folder, versions, splits)
    return folder


def is_complete(folder: Path) -> bool:
    """Whether a corpus is there, with all its files."""
    return all((folder / name).is_file() for name in ("train.parquet", "validation.parquet", "manifest.json"))


def describe_embedded_corpus() -> dict[str, Any]:
    """Name, hash of all texts (`manifest`), documents and bytes by split, and the packages with their versions."""
    manifest = read_json(ensure_embedded_corpus() / "manifest.json")
    packages = {
        split: ", ".join(f"{name} {p['version']}" for name, p in manifest["packages"].items() if p["split"] == split)
        for split in SPLITS
    }
    return {key: manifest[key] for key in ("name", "manifest", "documents", "bytes")} | {"packages": packages}


def default_cache() -> Path:
    """The user's cache folder, where the platform's convention puts it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "chatmodel"


def find_versions(packages: dict[str, str]) -> dict[str, str]:
    """The version of each package that is installed."""
    versions = {}
    for package in packages:
        try:
            version = importlib.metadata.version(package) if package != STANDARD_LIBRARY else platform.python_version()
        except importlib.metadata.PackageNotFoundError:
            continue
        versions[package] = version
    return versions


def corpus_key(versions: dict[str, str], splits: dict[str, str]) -> str:
    """Names one state of packages and of the code that reads them."""
    digest = hashlib.sha256(json.dumps([platform.python_version(), versions, splits]).encode())
    for name in BUILDER_FILES:
        digest.update(Path(__file__).with_name(name).read_bytes())
    return digest.hexdigest()[:12]


def build_corpus(folder: Path, versions: dict[str, str], splits: dict[str, str]) -> None:
    """Collect, de-duplicate and write the corpus beside `folder`, then rename it, so that it is whole or absent."""
    started = time.perf_counter()
    aside = make_folder_beside(folder)
    try:
        documents = select_documents(list(collect_documents(splits)))
        check_splits(documents)
        for split in SPLITS:
            write_documents([d for d in documents if d.split == split], aside / f"{split}.parquet")
        manifest = describe_documents(documents, versions)
        write_json(aside / "manifest.json", manifest | {"seconds": round(time.perf_counter() - started, 1)})
        if not is_complete(folder):  # another process may have been faster, with the same result
            publish_folder(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    logger.info(
        "embedded corpus: %d documents, %.1f MB, from %d packages in %.0f s, kept in %s",
        len(documents),
        sum(manifest["bytes"].values()) / 1e6,
        len(manifest["packages"]),
        time.perf_counter() - started,
        folder,
    )


def make_folder_beside(folder: Path) -> Path:
    """An empty folder with a name of its own in the same place, from which a rename is atomic."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise UserError(
            f"the embedded corpus cannot be written to {folder.parent} ({error.strerror});"
            " set XDG_CACHE_HOME to a folder you can write to"
        ) from None
    aside.chmod(0o755)  # mkdtemp's are private
    return aside


def check_splits(documents: list[Document]) -> None:
    """Raise a `UserError` unless both splits have documents."""
    for split in SPLITS:
        if not any(document.split == split for document in documents):
            raise UserError(
                f"the embedded corpus has no {split} text, for none of its packages is installed with its files;"
                " give your own text with --dataset FOLDER"
            )


def collect_documents(splits: dict[str, str]) -> Iterator[Document]:
    """The documents of all packages, the training packages' first."""
    order = sorted(splits, key=lambda package: splits[package])
    files = [file for package in order for file in find_files(package)]
    with tqdm(
        total=sum(file.size for file in files), desc="reading documentation", unit="B", unit_scale=True, disable=None
    ) as progress:
        for file, texts in zip(files, read_all(files), strict=True):
            progress.update(file.size)
            yield from (Document(text, file.package, splits[file.package]) for text in texts)
    if STANDARD_LIBRARY in splits:
        yield from (Document(text, STANDARD_LIBRARY, splits[STANDARD_LIBRARY]) for text in read_topics())


def read_all(files: list[SourceFile]) -> Iterator[list[str]]:
    """The documents of each file, in the files' order, read by as many processes as there are cores."""
    workers = min(multiprocessing.cpu_count(), MAX_WORKERS)
    if len(files) < MIN_PARALLEL_FILES or workers == 1:
        yield from map(read_documents, files)
        return
    # Parsing makes many objects: unfrozen, all that was imported is walked again and again, a third of the time.
    with multiprocessing.Pool(workers, initializer=gc.freeze) as pool:
        yield from pool.imap(read_documents, files, chunksize=16)


def select_documents(documents: list[Document]) -> list[Document]:
    """Without near-duplicates (validation loses what training says too), in an order given by the texts alone."""
    documents = sorted(documents, key=lambda document: document.split)
    texts = remove_near_duplicates([document.text for document in documents], min_words=MIN_DOCUMENT_WORDS)
    kept = [Document(text, d.source, d.split) for text, d in zip(texts, documents, strict=True) if text is not None]
    return sorted(kept, key=lambda document: hashlib.sha256(document.text.encode()).digest())


def write_documents(documents: list[Document], path: Path) -> None:
    """A parquet file with the columns `text` and `source`."""
    table = pa.table({"text": [d.text for d in documents], "source": [d.source for d in documents]})
    options = {"compression": "zstd", "write_page_checksum": True}  # two of three flipped bits go unnoticed without
    pq.write_table(table, path, row_group_size=ROW_GROUP_DOCUMENTS, **options)


def describe_documents(documents: list[Document], versions: dict[str, str]) -> dict[str, Any]:
    """What the manifest says: a hash over all texts in order, and counts by split and by package."""
    digest = hashlib.sha256()
    sizes: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for document in documents:
        size = len(document.text.encode())
        digest.update(f"{document.split} {size}\n{document.text}".encode())
        for key in (document.split, f"package {document.source}"):
            sizes[key] += size
            counts[key] += 1
    split_of = {document.source: document.split for document in documents}
    return {
        "name": "embedded",
        "manifest": digest.hexdigest(),
        "documents": {split: counts[split] for split in SPLITS},
        "bytes": {split: sizes[split] for split in SPLITS},
        "packages": {
            package: {
                "version": versions[package],
                "split": split_of[package],
                "documents": counts[f"package {package}"],
                "bytes": sizes[f"package {package}"],
            }
            for package in sorted(split_of)
        },
    }

"""How are documents read from parquet, JSON-lines or text files, and which of them are for validation?"""

import contextlib
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO, TypedDict

import pyarrow as pa
import pyarrow.parquet as pq

from chatmodel.runtime import UserError

SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".txt", ".txt.gz")
TEXT_SUFFIXES = (".txt", ".txt.gz")
READ_BATCH = 1_024
VALIDATION_NAME = re.compile(r"(^|[^a-z])(validation|valid|val|dev)([^a-z]|$)")
TEST_NAME = re.compile(r"(^|[^a-z])test([^a-z]|$)")
VALIDATION_SHARE = 0.01  # of the documents, where validation has no file of its own
# A text file is cut at blank lines into documents of at least so many characters, and anywhere from so many on.
MIN_TEXT_DOCUMENT = 2_000
MAX_TEXT_DOCUMENT = 20_000
END_OF_DOCUMENT = "<|endoftext|>"  # the separator line of TinyStories and its kin
HASH_THREADS = 8
# Row groups are read together up to so much text; a file with one that is larger than the second is read as a whole.
PIECE_BYTES = 3_000_000
MAX_ROW_GROUP_BYTES = 64_000_000


class DamagedFile(UserError):
    """A file of a data set that cannot be read to its end, or that is not what it was."""


class FileFacts(TypedDict):
    """What is kept of a file: its path below the data set's folder, size, time of the last change (ns) and sha256.

    The sha256 of a file that cannot be read is None.
    """

    name: str
    bytes: int
    modified: int
    sha256: str | None


def find_data_files(dataset: str) -> list[Path]:
    """The readable files of a folder (searched through, hidden ones left out), sorted; or the one file that is named.

    Raises:
        UserError: nothing is there, or nothing that can be read.
    """
    path = Path(dataset)
    if not path.exists():
        raise UserError(f"dataset {dataset} does not exist; give a folder, a file, a Hub name or 'embedded'")
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise UserError(f"dataset {dataset} is no {', '.join(SUFFIXES)} file; convert it to one of these")
        return [path]
    found = [p for p in path.rglob("*") if p.is_file() and not is_hidden(p.relative_to(path))]
    if not found:
        raise UserError(f"dataset folder {dataset} is empty; put {', '.join(SUFFIXES)} files into it")
    files = sorted((p for p in found if p.name.endswith(SUFFIXES)), key=lambda p: p.relative_to(path).as_posix())
    if not files:
        raise UserError(
            f"dataset folder {dataset} has no file that can be read, only {found[0].name} and the like;"
            f" put {', '.join(SUFFIXES)} files into it"
        )
    return files


def is_hidden(path: Path) -> bool:
    """Whether a part of a relative path begins with a dot."""
    return any(part.startswith(".") for part in path.parts)


def split_files(files: list[Path], split: str, *, root: Path) -> tuple[list[Path], bool]:
    """The files to read for a split, and whether their documents must still be divided by hash.

    Files whose path below `root` names it (validation, valid, val, dev) are the validation split, and then those named
    test are left out; else the last shard is (nanochat's convention). A single file, and text files, which are no
    shards, are divided by hash.
    """
    if len(files) == 1:
        return files, True
    names = {file: file.relative_to(root).as_posix().lower() for file in files}
    named = [file for file in files if VALIDATION_NAME.search(names[file])]
    rest = [file for file in files if not (VALIDATION_NAME.search(names[file]) or TEST_NAME.search(names[file]))]
    if named and rest:
        return (named if split == "validation" else rest), False
    if all(file.name.endswith(TEXT_SUFFIXES) for file in files):
        return files, True
    return (files[-1:] if split == "validation" else files[:-1]), False


def is_validation(text: str, *, share: float = VALIDATION_SHARE) -> bool:
    """Whether a document belongs to a validation split that is made by hash."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "replace")).digest()[:8]) < share * 2**64


def read_texts(file: Path, *, text_column: str) -> Iterator[str]:
    """The documents of one file; missing values are left out.

    Raises:
        UserError: the file is damaged, or has no such column.
    """
    if file.name.endswith(".parquet"):
        return read_parquet(file, text_column)
    return guard_text(file, read_text(file) if file.name.endswith(TEXT_SUFFIXES) else read_jsonl(file, text_column))


def read_parquet(file: Path, text_column: str, row_groups: Sequence[int] | None = None) -> Iterator[str]:
    """The values of a parquet file's text column, of some row groups or all, a batch of rows in memory at a time."""
    try:
        # The checksums of pages are compared where the writer left any; most leave none.
        with pq.ParquetFile(file, page_checksum_verification=True, pre_buffer=False) as parquet:
            schema = parquet.schema_arrow
            if text_column not in schema.names:
                raise UserError(missing_column(file, text_column, schema.names))
            kind = schema.field(text_column).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise UserError(f"column '{text_column}' of {file} holds {kind}, not text; name another text_column")
            # Threads bring nothing for a single column, and a forked process has none.
            for batch in parquet.iter_batches(READ_BATCH, row_groups, columns=[text_column], use_threads=False):
                yield from (text for text in batch.column(0).to_pylist() if text is not None)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise damaged_parquet(file, error) from None


def plan_row_groups(file: Path, text_column: str) -> list[list[int]] | None:
    """The row groups of a parquet file in runs of about `PIECE_BYTES` of text; None where one is too large for that.

    Raises:
        DamagedFile: the file is no parquet file, or cut short.
    """
    runs: list[list[int]] = []
    room = 0
    try:
        metadata = pq.read_metadata(file)
        columns = [metadata.schema.column(number).path for number in range(metadata.num_columns)]
        if text_column not in columns:
            return None  # reading says what there is
        for number in range(metadata.num_row_groups):
            size = metadata.row_group(number).column(columns.index(text_column)).total_uncompressed_size
            if size > MAX_ROW_GROUP_BYTES:
                return None
            if not runs or size > room:
                runs.append([])
                room = PIECE_BYTES
            runs[-1].append(number)
            room -= size
    except (pa.ArrowException, OSError) as error:
        raise damaged_parquet(file, error) from None
    return runs


def damaged_parquet(file: Path, error: Exception) -> DamagedFile:
    """The error about a parquet file that cannot be read."""
    return DamagedFile(f"{file} is damaged or no parquet file ({one_line(error)}); fetch it again or remove it")


def read_jsonl(file: Path, text_column: str) -> Iterator[str]:
    """The text column of a JSON-lines file, blank lines left out."""
    with open_text(file) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DamagedFile(f"line {number} of {file} is not JSON ({error.msg}); mend or remove it") from None
            text = take_text(row, text_column, f"line {number} of {file}")
            if text is not None:
                yield text


def take_text(row: Any, text_column: str, where: str) -> str | None:
    """The text of one JSON row; None where it is null."""
    if not isinstance(row, dict) or text_column not in row:
        raise UserError(missing_column(where, text_column, list(row) if isinstance(row, dict) else []))
    text = row[text_column]
    if text is not None and not isinstance(text, str):
        raise UserError(
            f"column '{text_column}' in {where} holds {type(text).__name__}, not text; name another text_column"
        )
    return text


def read_text(file: Path) -> Iterator[str]:
    """A text file cut into documents: at separator lines, else at blank lines once a document is long enough."""
    gathered: list[str] = []
    size = 0
    with open_text(file) as lines:
        for line in lines:
            ends = line.strip() == END_OF_DOCUMENT
            if not ends:
                gathered.append(line)
                size += len(line)
            if ends or size >= MAX_TEXT_DOCUMENT or (size >= MIN_TEXT_DOCUMENT and not line.strip()):
                yield "".join(gathered).strip()
                gathered, size = [], 0
    yield "".join(gathered).strip()


def open_text(file: Path, *, errors: str = "strict") -> TextIO:
    """A text file, unpacked where it is compressed; `errors` as `open` takes it."""
    if file.name.endswith(".gz"):
        return gzip.open(file, "rt", encoding="utf-8-sig", errors=errors)
    return file.open(encoding="utf-8-sig", errors=errors)


def guard_text(file: Path, texts: Iterator[str]) -> Iterator[str]:
    """Say in one sentence what is wrong with a text file that cannot be read to its end."""
    try:
        yield from texts
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DamagedFile(f"{file} is cut short or damaged ({one_line(error)}); fetch it again or remove it") from None
    except UnicodeDecodeError as error:
        raise DamagedFile(f"{file} is not UTF-8 text (byte {error.start}); convert it") from None
    except OSError as error:
        raise DamagedFile(
            f"{file} cannot be read ({error.strerror or error}); make it readable or remove it"
        ) from None


def missing_column(where: Path | str, text_column: str, columns: list[str]) -> str:
    """The sentence about a column that is not there."""
    there = f"only {', '.join(map(str, columns))}" if columns else "no columns at all"
    return f"{where} has no column '{text_column}', {there}; name the one that holds the text with text_column"


def one_line(error: Exception) -> str:
    """An error's message without line ends."""
    return " ".join(str(error).split())


def list_files(dataset: str, *, known: Iterable[FileFacts] = ()) -> list[FileFacts]:
    """The files of a data set with their sha256.

    Args:
        known: facts of an earlier time; a file with the same name, size and time of change is not read again.
    """
    root = Path(dataset)
    recalled = {(facts["name"], facts["bytes"], facts["modified"]): facts["sha256"] for facts in known}

    def describe(file: Path) -> FileFacts:
        status = file.stat()
        name = name_below(file, root)
        sha256 = recalled.get((name, status.st_size, status.st_mtime_ns))
        if sha256 is None:
            with contextlib.suppress(DamagedFile):  # whoever reads it says so
                sha256 = hash_file(file)
        return {"name": name, "bytes": status.st_size, "modified": status.st_mtime_ns, "sha256": sha256}

    with ThreadPoolExecutor(HASH_THREADS) as pool:  # hashing gives the interpreter lock away
        return list(pool.map(describe, find_data_files(dataset)))


def name_below(file: Path, root: Path) -> str:
    """What a file of a data set is called: its path below the folder, or its name where the data set is one file."""
    return file.relative_to(root).as_posix() if file != root else file.name


def name_files(names: Sequence[str]) -> str:
    """A few names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def describe_files(
    dataset: str, *, listing: Sequence[FileFacts] | None = None, ignore_damage: bool = False
) -> dict[str, Any]:
    """Name, manifest hash (over file names, sizes and contents), and documents where counting them costs nothing.

    Args:
        listing: what `list_files` said of it.
        ignore_damage: a damaged file is no error, only the number of documents is left out.
    """
    listing = list_files(dataset) if listing is None else listing
    manifest = hashlib.sha256()
    for facts in listing:
        manifest.update(f"{facts['name']}\t{facts['bytes']}\t{facts['sha256']}\n".encode())
    description: dict[str, Any] = {
        "name": dataset,
        "manifest": manifest.hexdigest(),
        "files": len(listing),
        "bytes": sum(facts["bytes"] for facts in listing),
    }
    files = find_data_files(dataset)
    held_out, by_hash = split_files(files, "validation", root=Path(dataset))
    description["validation"] = (
        f"{VALIDATION_SHARE:.0%} of the documents, by hash"
        if by_hash
        else name_files([name_below(file, Path(dataset)) for file in held_out])
    )
    if all(file.suffix == ".parquet" for file in files):
        try:
            description["documents"] = sum(count_rows(file) for file in files)
        except DamagedFile:
            if not ignore_damage:
                raise
    return description


def hash_file(file: Path) -> str:
    """The sha256 of a file's content.

    Raises:
        DamagedFile: it cannot be read.
    """
    try:
        with file.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    except OSError as error:
        raise DamagedFile(
            f"{file} cannot be read ({error.strerror or error}); make it readable or remove it"
        ) from None


def count_rows(file: Path) -> int:
    """The rows a parquet file says it has."""
    try:
        return int(pq.read_metadata(file).num_rows)
    except (pa.ArrowException, OSError) as error:
        raise damaged_parquet(file, error) from None

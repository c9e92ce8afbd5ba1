"""Which files hold a split, how are they read, and what is done about one that cannot be?"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from chatmodel.data.files import (
    VALIDATION_SHARE,
    DamagedFile,
    FileFacts,
    find_data_files,
    hash_file,
    is_validation,
    name_below,
    read_texts,
    split_files,
)
from chatmodel.runtime import UserError

logger = logging.getLogger("chatmodel")

BAD_SHARD_POLICIES = ("stop", "skip", "refetch")
CHECKSUM_FILE = "SHA256SUMS"
RECORDED = "an earlier reading of the same size and time"


@dataclass(frozen=True)
class Shard:
    """A file of a data set.

    name: its path below the data set's folder, or in its repository.
    size: bytes.
    fetch: gives the place of the file on this machine; with `again`, after getting it anew.
    sha256: what its content must have, and `authority` who says so; None where nothing is known.
    remote: whether it can be fetched again.
    """

    name: str
    size: int
    fetch: Callable[[bool], Path]
    sha256: str | None = None
    authority: str = "the Hub"
    remote: bool = False

    def verified(self) -> tuple[Path, str]:
        """The place of the file and its sha256.

        Raises:
            DamagedFile: the content is another one than it must be.
        """
        path = self.fetch(False)
        digest = hash_file(path)
        if self.sha256 is not None and digest != self.sha256:
            raise DamagedFile(
                f"{path} is damaged: its sha256 is {digest[:12]}..., but {self.authority} says {self.sha256[:12]}...;"
                " fetch it again or remove it"
            )
        return path, digest


@dataclass(frozen=True)
class Selection:
    """The column of a file that holds the text, and which of its documents belong to the split.

    validation_share: of the documents, chosen by hash; None where the files belong to one split as a whole.
    """

    split: str
    text_column: str
    validation_share: float | None = None

    def keeps(self, text: str) -> bool:
        """Whether a document is one of the split's, and not empty."""
        if not text or self.validation_share is None:
            return bool(text)
        return is_validation(text, share=self.validation_share) == (self.split == "validation")


@dataclass(frozen=True)
class Shards:
    """The files that hold a split, in the order in which they are read."""

    files: tuple[Shard, ...]
    selection: Selection

    def read(self, on_bad_shard: str = "stop") -> Iterator[str]:
        """The documents; of a shard that turns out to be bad on the way, those before the damage are given."""
        quarantine = Quarantine(on_bad_shard, self.files)
        for shard in self.files:
            given = 0
            reading = True
            while reading:
                reading = False
                try:
                    path = shard.fetch(False) if shard.sha256 is None else shard.verified()[0]
                    texts = read_texts(path, text_column=self.selection.text_column)
                    for text in islice(texts, given, None):
                        given += 1
                        if self.selection.keeps(text):
                            yield text
                except DamagedFile as error:
                    reading = quarantine.admit(shard, error)


@dataclass
class Quarantine:
    """What is done about shards that cannot be read, and the record of it.

    policy: "stop"; "skip", which leaves the shard out; or "refetch", which gets it from the Hub once more, then stops.
    records: name, reason, sha256 (None where the file cannot be read at all) and what was done, for each bad shard.

    Raises:
        UserError: there is no such policy, or not for these files.
    """

    policy: str
    shards: Sequence[Shard]
    records: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.policy not in BAD_SHARD_POLICIES:
            raise UserError(f"on_bad_shard '{self.policy}' is unknown; choose one of {', '.join(BAD_SHARD_POLICIES)}")
        if self.policy == "refetch" and not all(shard.remote for shard in self.shards):
            raise UserError("on_bad_shard 'refetch' is for data sets of the Hub; choose 'stop' or 'skip'")

    def admit(self, shard: Shard, error: DamagedFile) -> bool:
        """Take note of a bad shard; True when it is there anew and can be read from its beginning.

        Raises:
            DamagedFile: the policy is to stop, or getting it again did not help.
        """
        seen_before = any(record["name"] == shard.name for record in self.records)
        if self.policy == "stop":
            hint = "with on_bad_shard 'skip' it is left out" + (
                ", with 'refetch' it is fetched again" if shard.remote else ""
            )
            raise DamagedFile(f"{error}; {hint}") from None
        if seen_before:
            raise DamagedFile(f"{error}; it was fetched twice, so it is bad on the Hub too") from None
        refetched = self.policy == "refetch"
        action = "fetched again" if refetched else "skipped"
        self.records.append(
            {"name": shard.name, "reason": str(error), "sha256": try_hash(shard), "skipped": not refetched}
        )
        logger.warning("bad shard %s is %s: %s", shard.name, action, error)
        if refetched:
            shard.fetch(True)
        return refetched


def try_hash(shard: Shard) -> str | None:
    """The sha256 of a bad shard; None where it cannot be read at all."""
    try:
        return hash_file(shard.fetch(False))
    except UserError:
        return None


def fetch_in_turn(shards: Sequence[Shard], *, first: int) -> Iterator[tuple[int, Path, str]]:
    """Number, place and sha256 of each shard from `first` on.

    Raises:
        BadShard: a file cannot be read, or has another content than it must have.
    """
    for number in range(first, len(shards)):
        try:
            path, digest = shards[number].verified()
        except DamagedFile as error:
            raise BadShard(number, error) from None
        yield number, path, digest


class BadShard(Exception):
    """Shard `number` of a split cannot be read, for the reason `error`."""

    def __init__(self, number: int, error: DamagedFile) -> None:
        super().__init__(number, error)
        self.number = number
        self.error = error


def find_file_shards(dataset: str, split: str, *, text_column: str, listing: Iterable[FileFacts] = ()) -> Shards:
    """The files of a split of a local data set.

    What their contents must be is said by a file `SHA256SUMS` in the folder, as `sha256sum` writes it, or else by the
    listing. Without either, two of three flipped bits in a parquet file go unnoticed, for most writers give its pages
    no checksums, and another text is read.

    Args:
        listing: the files as `list_files` found them once.

    Raises:
        UserError: nothing is there, or nothing that can be read.
    """
    root = Path(dataset)
    found = find_data_files(dataset)
    chosen, by_hash = split_files(found, split, root=root)
    recorded = {facts["name"]: facts["sha256"] for facts in listing}
    published = read_checksum_file(root / CHECKSUM_FILE)
    files = []
    for file in chosen:
        name = name_below(file, root)
        known = (published.get(name), CHECKSUM_FILE) if name in published else (recorded.get(name), RECORDED)
        files.append(local_shard(file, name, *known))
    return Shards(tuple(files), Selection(split, text_column, VALIDATION_SHARE if by_hash else None))


def local_shard(file: Path, name: str, sha256: str | None = None, authority: str = RECORDED) -> Shard:
    """A file that lies on this machine."""
    try:
        size = file.stat().st_size
    except OSError:
        size = 0  # reading says what is wrong with it
    return Shard(name, size, lambda again: file, sha256, authority)


def read_checksum_file(file: Path) -> dict[str, str]:
    """The sha256 of each name in a file of lines "sha256  name"; nothing where there is no such file."""
    if not file.is_file():
        return {}
    lines = [line.split(maxsplit=1) for line in file.read_text().splitlines() if line.strip()]
    if not all(len(parts) == 2 and len(parts[0]) == 64 for parts in lines):
        raise UserError(f"{file} has lines that are not 'sha256  name'; make it with `sha256sum * > SHA256SUMS`")
    return {name.lstrip("*").removeprefix("./"): digest.lower() for digest, name in lines}

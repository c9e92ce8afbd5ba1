"""Where is CORE's data, and is it the official one? A bundle is a folder, a zip file, or the address of a zip file."""

import hashlib
import os
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tqdm import tqdm

from chatmodel.evaluation.scoring import get_rank, wait_for_ranks
from chatmodel.runtime import UserError, logger

BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
HOW_TO_GET_BUNDLE = f"`curl -LO {BUNDLE_URL}`, then give `--eval_bundle eval_bundle.zip`"
# Hash (`hash_data`) of the 21 files of eval_data in nanochat's bundle.
OFFICIAL_DATA = "0315e86c4ad9d4150142b57b0dd8494c30079be02c5bc37fac7a3175c8f12b2b"
CACHE = Path("~/.cache/chatmodel")
TIMEOUT_SECONDS = 60.0
CHUNK_BYTES = 2**20


def find_bundle(bundle: Path | str, *, cache: Path = CACHE) -> Path:
    """The folder or zip file of a bundle; an address is downloaded once, into `cache`.

    An address or the path of a zip file may end in `#sha256=...`, which the zip file must then have.

    Raises:
        UserError: the file does not exist, cannot be downloaded, or has another checksum.
    """
    place, _, wanted = str(bundle).partition("#sha256=")
    if is_address(bundle):
        path = _download_once(place, wanted.lower(), cache.expanduser())
    else:
        path = find_place(bundle)
        if not path.exists():
            raise UserError(f"the CORE bundle {place} does not exist; {HOW_TO_GET_BUNDLE}")
        if wanted and path.is_dir():
            raise UserError(f"#sha256= is for a zip file, and {place} is a folder; leave the checksum out")
    if wanted and (found := hash_file(path)) != wanted.lower():
        raise UserError(
            f"the CORE bundle {path} has the sha256 {found}, not {wanted}; delete the file and fetch it anew, or"
            " correct the checksum"
        )
    return path


def is_address(bundle: Path | str) -> bool:
    """Whether a bundle must be downloaded."""
    return urlsplit(str(bundle)).scheme in ("http", "https")


def find_place(bundle: Path | str) -> Path:
    """The path of a bundle that is none, without its checksum."""
    return Path(str(bundle).partition("#sha256=")[0])


def _download_once(url: str, wanted: str, cache: Path) -> Path:
    """One file for each address; the first rank of a machine fetches it."""
    name = f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{Path(urlsplit(url).path).name or 'eval_bundle.zip'}"
    path = cache / name
    if not path.exists() and int(os.environ.get("LOCAL_RANK", "0")) == 0:
        download(url, path, wanted=wanted)
    wait_for_ranks()
    if not path.exists():
        raise UserError(f"the CORE bundle was not downloaded from {url} by the first rank; see its message")
    logger.info("CORE's data: %s, from %s", path, url)
    return path


def download(url: str, path: Path, *, wanted: str = "") -> None:
    """Fetch a file whole, or not at all; with a sha256 to compare, if one is `wanted`.

    Raises:
        UserError: the address cannot be read, or what it gives is cut short or has another checksum.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        found, size, expected = _fetch(url, aside)
        if expected is not None and size != expected:
            raise UserError(f"{url} gave {size} of {expected} bytes; start again")
        if wanted and found != wanted:
            raise UserError(
                f"{url} gave a file with the sha256 {found}, not {wanted}; correct the address or checksum"
            )
        aside.replace(path)
    except (OSError, urllib.error.URLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the CORE bundle cannot be downloaded from {url} ({reason}); {HOW_TO_GET_BUNDLE}") from None
    finally:
        aside.unlink(missing_ok=True)


def _fetch(url: str, path: Path) -> tuple[str, int, int | None]:
    """(sha256, bytes, bytes that were announced)."""
    digest, size = hashlib.sha256(), 0
    with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as answer, path.open("wb") as file:
        length = answer.headers.get("Content-Length")
        expected = int(length) if length is not None else None
        hidden = None if get_rank()[0] == 0 else True
        with tqdm(desc="CORE bundle", total=expected, unit="B", unit_scale=True, disable=hidden, leave=False) as bar:
            while chunk := answer.read(CHUNK_BYTES):
                digest.update(chunk)
                file.write(chunk)
                size += len(chunk)
                bar.update(len(chunk))
    return digest.hexdigest(), size, expected


def open_bundle(bundle: Path) -> Any:
    """The folder with core.yaml, as a `Path` or a `zipfile.Path`; it may lie one level down in `eval_bundle/`.

    Raises:
        UserError: there is none.
    """
    if not bundle.exists():
        raise UserError(f"the CORE bundle {bundle} does not exist; {HOW_TO_GET_BUNDLE}")
    try:
        root: Any = bundle if bundle.is_dir() else zipfile.Path(bundle)
    except zipfile.BadZipFile:
        raise UserError(f"the CORE bundle {bundle} is neither a folder nor a zip file; {HOW_TO_GET_BUNDLE}") from None
    for folder in (root, root / "eval_bundle"):
        if (folder / "core.yaml").exists():
            return folder
    raise UserError(f"the CORE bundle {bundle} holds no core.yaml; {HOW_TO_GET_BUNDLE}")


def describe_bundle(bundle: Path) -> dict[str, Any]:
    """What results say of the data: its hash, and whether it is nanochat's; a warning where it is not."""
    found = hash_data(open_bundle(bundle) / "eval_data")
    if found != OFFICIAL_DATA:
        logger.warning("the data in %s is not nanochat's bundle: CORE is not comparable with its", bundle)
    return {"data_sha256": found, "is_official": found == OFFICIAL_DATA}


def hash_data(folder: Any) -> str:
    """sha256 over the names and sha256 of all .jsonl files below a folder, in the order of their names."""
    total = hashlib.sha256()
    for name, path in sorted(_list_files(folder, "")):
        total.update(f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


def _list_files(folder: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for path in folder.iterdir():
        if path.is_dir():
            yield from _list_files(path, f"{prefix}{path.name}/")
        elif path.name.endswith(".jsonl"):
            yield f"{prefix}{path.name}", path


def hash_file(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

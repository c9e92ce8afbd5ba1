"""How is damage on the disk found, fast enough to look for it at every start?"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from chatmodel.workers import count_cores

BLOCK_BYTES = 2**26  # each block has a checksum of its own, so that all cores can compute them
READ_BYTES = 2**20


def hash_blocks(file: Path, *, block_bytes: int = BLOCK_BYTES) -> list[str]:
    """The sha256 of each block of a file, computed on all cores."""
    starts = range(0, file.stat().st_size, block_bytes)
    with ThreadPoolExecutor(count_cores()) as pool:  # hashing gives the interpreter lock away
        return list(pool.map(lambda start: hash_block(file, start, block_bytes), starts))


def hash_block(file: Path, start: int, size: int) -> str:
    """The sha256 of `size` bytes of a file, or of what there is of them."""
    digest = hashlib.sha256()
    with file.open("rb", buffering=0) as content:
        content.seek(start)
        while size and (chunk := content.read(min(size, READ_BYTES))):
            digest.update(chunk)
            size -= len(chunk)
    return digest.hexdigest()


def find_damaged_block(file: Path, expected: list[str], *, block_bytes: int) -> int | None:
    """The number of the first block that has another sha256 than `expected`; None if all are right."""
    found = hash_blocks(file, block_bytes=block_bytes)
    pairs = enumerate(zip(found, expected, strict=True))
    return next((number for number, (have, want) in pairs if have != want), None)

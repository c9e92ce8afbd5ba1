"""Which paragraphs and documents say again what an earlier one said?"""

import re
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

SHINGLE_WORDS = 8
MAX_REPEATED = 0.5  # a paragraph, or a document, of which more than this was said before is dropped
WORD = re.compile(r"\w+")
PARAGRAPH = re.compile(r"(\n+)")


def remove_near_duplicates(documents: Sequence[str], *, min_words: int) -> list[str | None]:
    """Each document without its repeated paragraphs, or None where it repeats earlier ones or keeps under `min_words`.

    A paragraph is repeated when over half of its runs of 8 words occur in earlier paragraphs, of any document.
    """
    pieces = [PARAGRAPH.split(document) for document in documents]
    paragraphs = [paragraph for piece in pieces for paragraph in piece[::2]]
    repeated = iter(find_repeated(paragraphs))
    kept: list[str | None] = []
    for piece in pieces:
        is_new = [not next(repeated) for _ in piece[::2]]
        sizes = [len(WORD.findall(paragraph)) for paragraph in piece[::2]]
        new_words = sum(size for size, new in zip(sizes, is_new, strict=True) if new)
        if new_words < max(min_words, (1 - MAX_REPEATED) * sum(sizes)):
            kept.append(None)
            continue
        # Every paragraph carries the separator before it; the first kept one loses it.
        parts = [piece[0], *(before + text for before, text in zip(piece[1::2], piece[2::2], strict=True))]
        kept.append("".join(part for part, new in zip(parts, is_new, strict=True) if new).strip("\n"))
    return kept


def find_repeated(paragraphs: Sequence[str]) -> list[bool]:
    """For each paragraph whether most of its 8-word runs occur in earlier ones; one of fewer words never is."""
    word_hashes, lengths = hash_words(paragraphs)
    num_windows = np.maximum(lengths - SHINGLE_WORDS + 1, 0)
    owner = np.repeat(np.arange(len(paragraphs)), num_windows)
    first_word = np.cumsum(lengths) - lengths
    first_window = np.cumsum(num_windows) - num_windows
    starts = np.arange(len(owner)) - np.repeat(first_window - first_word, num_windows)

    shingles = np.zeros(len(owner), dtype=np.uint64)
    for offset in range(SHINGLE_WORDS):  # a polynomial hash; unsigned overflow is meant
        shingles = shingles * np.uint64(0x9E3779B97F4A7C15) + word_hashes[starts + offset]
    _, first, inverse = np.unique(shingles, return_index=True, return_inverse=True)
    seen_before = owner[first[inverse]] < owner
    seen = np.bincount(owner, weights=seen_before, minlength=len(paragraphs))
    return list(seen > MAX_REPEATED * num_windows)


def hash_words(paragraphs: Sequence[str]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Hashes of all words of all paragraphs in one row, lower-cased, and the number of words of each paragraph."""
    known: dict[str, int] = {}
    hashes: list[int] = []
    lengths = np.zeros(len(paragraphs), dtype=np.int64)
    for index, paragraph in enumerate(paragraphs):
        words = WORD.findall(paragraph.lower())
        lengths[index] = len(words)
        for word in words:
            code = known.get(word)
            if code is None:
                code = known[word] = zlib.crc32(word.encode()) + 1
            hashes.append(code)
    return np.array(hashes, dtype=np.uint64), lengths

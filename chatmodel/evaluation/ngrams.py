"""Which runs of n words does a text hold? Hashes of them, many megabytes a second.

Words are what stands between blanks and punctuation, in lower case: "Don't stop!" is "don", "t", "stop". Bytes beyond
ASCII belong to words, except the typographic marks of U+2000 to U+203F and the unbreakable blank.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

Hashes = np.ndarray[Any, np.dtype[np.uint64]]
Numbers = np.ndarray[Any, np.dtype[np.int64]]

# Odd, so that they have inverses modulo 2**64; otherwise arbitrary.
WORD_FACTOR = 0x9E3779B97F4A7C15
NGRAM_FACTOR = np.uint64(0xD1342543DE82EF95)
WORD_BYTES = np.array([chr(byte).isalnum() or byte >= 128 for byte in range(128)] + [True] * 128)


class Words(NamedTuple):
    """Words of a batch of texts, one after another: hashes, the text each is in, and where its bytes are in `data`."""

    hashes: Hashes
    texts: Numbers
    starts: Numbers
    ends: Numbers
    data: bytes


class Ngrams(NamedTuple):
    """Hashes of all runs of n words within one text, and the index of the first word of each."""

    hashes: Hashes
    positions: Numbers


def hash_words(texts: Sequence[str]) -> Words:
    """The words of texts.

    A word's hash is a polynomial in its bytes; those of all words come from one running sum over the whole batch.
    """
    encoded = [text.lower().encode("utf-8", errors="replace") for text in texts]
    joined = b"\n".join(encoded)
    data = np.frombuffer(joined, dtype=np.uint8)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], find_word_bytes(data), [False]]).astype(np.int8)))
    starts, ends = edges[::2], edges[1::2]
    powers, inverses = find_powers(1 << max(16, len(data).bit_length()))
    sums: Hashes = np.zeros(len(data) + 1, dtype=np.uint64)
    np.cumsum(data * powers[: len(data)], out=sums[1:])
    hashes = mix((sums[ends] - sums[starts]) * inverses[starts])
    limits = np.cumsum([len(text) + 1 for text in encoded])
    return Words(hashes, np.searchsorted(limits, starts, side="right"), starts, ends, joined)


def find_word_bytes(data: "np.ndarray[Any, np.dtype[np.uint8]]") -> "np.ndarray[Any, np.dtype[np.bool_]]":
    """Whether each byte belongs to a word."""
    found = WORD_BYTES[data]
    leads = np.flatnonzero((data[:-2] == 0xE2) & (data[1:-1] == 0x80)) if len(data) > 2 else np.array([], dtype=int)
    blanks = np.flatnonzero((data[:-1] == 0xC2) & (data[1:] == 0xA0))
    for places in (leads, leads + 1, leads + 2, blanks, blanks + 1):
        found[places] = False
    return found


@cache
def find_powers(count: int) -> tuple[Hashes, Hashes]:
    """The first `count` powers of the factor and of its inverse, modulo 2**64."""
    inverse = pow(WORD_FACTOR, -1, 2**64)
    factors = [np.full(count, factor, dtype=np.uint64) for factor in (WORD_FACTOR, inverse)]
    for powers in factors:
        powers[0] = 1
        np.cumprod(powers, out=powers)
    return factors[0], factors[1]


def mix(hashes: Hashes) -> Hashes:
    """Spread every bit over all others (the finalizer of MurmurHash3), so that sums of hashes do not collide."""
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        hashes = (hashes ^ (hashes >> np.uint64(33))) * np.uint64(factor)
    return hashes ^ (hashes >> np.uint64(33))


def hash_ngrams(words: Words, n: int) -> Ngrams:
    """All runs of `n` words that lie within one text."""
    count = max(0, len(words.hashes) - n + 1)
    total: Hashes = np.zeros(count, dtype=np.uint64)
    for offset in range(n):
        total = total * NGRAM_FACTOR + words.hashes[offset : offset + count]
    positions = np.flatnonzero(words.texts[:count] == words.texts[n - 1 : n - 1 + count])
    return Ngrams(mix(total[positions]), positions)


def write_ngram(words: Words, position: int, n: int) -> str:
    """The text of a run of words, normalised."""
    spans = zip(words.starts[position : position + n], words.ends[position : position + n], strict=True)
    return " ".join(words.data[start:end].decode("utf-8", errors="replace") for start, end in spans)

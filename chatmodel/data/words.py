"""Which words are there for the spelling and counting tasks, and which of them are never trained on?"""

import gzip
import hashlib
import re
import zlib
from collections import Counter, defaultdict
from pathlib import Path

import pyarrow.parquet as pq

from chatmodel.data.embedded import SPLITS, ensure_embedded_corpus
from chatmodel.runtime import UserError

EMBEDDED = "embedded"
WORD = re.compile(r"[a-z]{3,12}")
# A word of running text: neither part of an identifier, a path, a call or a hyphenation, nor a possessive.
WORD_IN_TEXT = re.compile(r"(?<![\w.'/\\@#$%&=+*<>~^`-])[A-Za-z]?[a-z]{2,11}(?![\w(\[/\\@=_<>~^`'*-]|\.\w)")
MIN_OCCURRENCES = 3
MIN_PACKAGES = 2  # what only one package says is mostly its jargon
MAX_WORDS = 20_000
HELD_OUT_SHARE = 0.2


def load_words(source: str) -> list[str]:
    """Words of 3 to 12 letters a-z, sorted, each once.

    Args:
        source: "embedded" for the frequent words of the embedded corpus, else a .txt or .txt.gz file, a word a line;
            of a file the words with other letters or of another length are left out.

    Raises:
        UserError: the file is missing, damaged, or has no such word.
    """
    return harvest_words(ensure_embedded_corpus()) if source == EMBEDDED else read_words(Path(source))


def is_held_out(word: str) -> bool:
    """Whether a word is kept for testing: about one in five, by a hash of the word alone."""
    return int.from_bytes(hashlib.sha256(word.encode()).digest()[:8]) < HELD_OUT_SHARE * 2**64


def harvest_words(folder: Path, *, min_packages: int = MIN_PACKAGES) -> list[str]:
    """The words of the corpus in `folder` that are frequent enough and that several packages use."""
    counts: Counter[str] = Counter()
    packages: defaultdict[str, set[str]] = defaultdict(set)
    for split in SPLITS:
        table = pq.read_table(folder / f"{split}.parquet")
        for text, package in zip(table["text"].to_pylist(), table["source"].to_pylist(), strict=True):
            words = [word.lower() for word in WORD_IN_TEXT.findall(text)]
            counts.update(words)
            for word in set(words):
                packages[word].add(package)
    frequent = (
        word
        for word, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        if count >= MIN_OCCURRENCES and len(packages[word]) >= min_packages and WORD.fullmatch(word)
    )
    return sorted(list(frequent)[:MAX_WORDS])


def read_words(file: Path) -> list[str]:
    """The words of a word-list file."""
    try:
        with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
            words = {line.strip() for line in lines}
    except FileNotFoundError:
        raise UserError(f"word list {file} does not exist; give a .txt or .txt.gz file, or 'embedded'") from None
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(
            f"word list {file} cannot be read ({error}); give a .txt or .txt.gz file of UTF-8 text"
        ) from None
    fitting = sorted(word for word in words if WORD.fullmatch(word))
    if not fitting:
        raise UserError(f"word list {file} has no word of 3 to 12 lower-case letters a-z; write one word a line")
    return fitting

"""How do very many prompts become ids quickly, and exactly as the tokenizer itself would make them?"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import tiktoken
from numpy.typing import NDArray

from chatmodel.evaluation.scoring import encode_texts, get_start_token
from chatmodel.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERNS, build_encoding, read_split_pattern
from chatmodel.workers import count_cores

# Words, digits, blanks, line breaks, marks, other scripts, a control token's name: where splitting could differ.
SAMPLE = "It's  7531 words,\n\n\tisn't it?!\r\n<|bos|> Größe 東京 🙂  \n x=f(1)#\n"
# Texts that go to a thread at a time.
BLOCK = 64


class PromptEncoder:
    """Token ids of texts after the start token; names of special tokens in a text stay text."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.start = np.array([get_start_token(tokenizer)], dtype=np.int32)
        self.encoding = find_fast_encoding(tokenizer)

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """The ids of each text."""
        if self.encoding is None:
            return [np.asarray(ids, dtype=np.int32) for ids in encode_texts(self.tokenizer, list(texts))]
        blocks = [texts[begin : begin + BLOCK] for begin in range(0, len(texts), BLOCK)]
        if len(blocks) < 2:
            return self._encode_block(texts)
        with ThreadPoolExecutor(count_cores()) as pool:  # tiktoken frees the interpreter lock
            return [ids for block in pool.map(self._encode_block, blocks) for ids in block]

    def _encode_block(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        return [np.concatenate([self.start, self._encode_text(text)]) for text in texts]

    def _encode_text(self, text: str) -> NDArray[np.int32]:
        assert self.encoding is not None
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=()).astype(np.int32)
        except UnicodeEncodeError:  # a lone surrogate
            return np.array(self.encoding.encode_ordinary(text), dtype=np.int32)


def find_fast_encoding(tokenizer: Any) -> tiktoken.Encoding | None:
    """tiktoken's form of a tokenizer of ours, several times faster; None for others."""
    if not set(SPECIAL_TOKENS) <= set(tokenizer.get_vocab()):
        return None
    try:
        if read_split_pattern(tokenizer) not in SPLIT_PATTERNS.values():
            return None
        encoding = build_encoding(tokenizer)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return None
    return encoding if encoding.encode_ordinary(SAMPLE) == encode_texts(tokenizer, [SAMPLE])[0][1:] else None

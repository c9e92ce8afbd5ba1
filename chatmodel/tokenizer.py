"""How text becomes ids: a byte-level BPE tokenizer, trained here and saved so that any Hugging Face tool loads it."""

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import rustbpe
import tiktoken
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from chatmodel.model_folders import explain_no_model
from chatmodel.runtime import UserError, write_json

# Order and names are nanochat's: they stand at the end of the vocabulary and are never trained.
SPECIAL_TOKENS = (
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)
MINIMUM_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)

# GPT-4's pattern with digits in groups of at most two instead of three, which small vocabularies can afford.
# Source: karpathy/nanochat nanochat/tokenizer.py@c75fe54; the pattern of GPT-4 is tiktoken's
# tiktoken_ext/openai_public.py, cl100k_base.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)

# Qwen2's pattern, as llama.cpp's pre-tokenizer "qwen2" has it (single digits), for models that are to run there.
# Source: ggml-org/llama.cpp src/llama-vocab.cpp@00ad355, LLAMA_VOCAB_PRE_TYPE_QWEN2.
QWEN2_SPLIT_PATTERN = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLIT_PATTERNS = {"chatmodel": SPLIT_PATTERN, "qwen2": QWEN2_SPLIT_PATTERN}

# What an expression for the calculator can be made of, and the texts its results are written with.
CALCULATOR_CHARACTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789 '\"+-*/().,_%")
CALCULATOR_OUTPUTS = ("-", ".", *(str(n) for n in range(10)), *(f"{n:02}" for n in range(100)))


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    replaced = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(replaced)}
    return [table[byte] for byte in range(256)]


BYTE_CHARACTERS = _byte_characters()
CHARACTER_BYTES = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}


def train_tokenizer(
    documents: Iterable[str],
    vocab_size: int,
    *,
    max_chars: int,
    doc_cap: int,
    model_max_length: int = 2048,
    split: str = "chatmodel",
) -> PreTrainedTokenizerFast:
    """Train on documents cut to `doc_cap` characters, until `max_chars` characters are read.

    Args:
        vocab_size: all ids, the special tokens included.
        split: a name in `SPLIT_PATTERNS`: how text is cut before merging.

    Raises:
        UserError: the vocabulary is too small, the text too little for it, or the split unknown.

    Source: karpathy/nanochat scripts/tok_train.py@c75fe54.
    """
    tokenizer, _ = train_and_measure(
        documents, vocab_size, max_chars=max_chars, doc_cap=doc_cap, model_max_length=model_max_length, split=split
    )
    return tokenizer


def train_and_measure(
    documents: Iterable[str],
    vocab_size: int,
    *,
    max_chars: int,
    doc_cap: int,
    model_max_length: int = 2048,
    split: str = "chatmodel",
) -> tuple[PreTrainedTokenizerFast, dict[str, Any]]:
    """`train_tokenizer`, and the statistics of the training for the report.

    `train_seconds` includes reading the documents; `token_bytes` is over all tokens but the special ones.
    """
    if vocab_size < MINIMUM_VOCAB_SIZE:
        raise UserError(
            f"vocab_size {vocab_size} is too small: 256 bytes and {len(SPECIAL_TOKENS)} special tokens need "
            f"at least {MINIMUM_VOCAB_SIZE}"
        )
    for name, value in {"max_chars": max_chars, "doc_cap": doc_cap, "model_max_length": model_max_length}.items():
        if value < 1:
            raise UserError(f"{name} is {value}; give a number of at least 1")
    if split not in SPLIT_PATTERNS:
        raise UserError(f"split={split!r} is unknown; choose one of {', '.join(SPLIT_PATTERNS)}")
    pattern = SPLIT_PATTERNS[split]
    read = {"train_documents": 0, "train_chars": 0}
    started = time.perf_counter()
    texts = _cut_documents(documents, max_chars=max_chars, doc_cap=doc_cap, read=read)
    tokens = _train_tokens(texts, vocab_size, pattern)
    seconds = time.perf_counter() - started
    _check_enough_text(tokens, vocab_size, **read)
    tokenizer = convert_tokens(tokens, model_max_length=model_max_length, split_pattern=pattern)
    statistics = {
        "vocab_size": vocab_size,
        "num_special_tokens": len(SPECIAL_TOKENS),
        "max_chars": max_chars,
        "doc_cap": doc_cap,
        **read,
        "train_seconds": seconds,
        "token_bytes": describe_token_bytes(tokenizer),
    }
    return tokenizer, statistics


def _cut_documents(documents: Iterable[str], *, max_chars: int, doc_cap: int, read: dict[str, int]) -> Iterator[str]:
    """Count into `read` what is given out; the last document may reach beyond `max_chars`, as in nanochat."""
    with tqdm(desc="tokenizer", unit="char", unit_scale=True, disable=None) as progress:
        for document in documents:
            text = document[:doc_cap]
            read["train_documents"] += 1
            read["train_chars"] += len(text)
            progress.update(len(text))
            yield text
            if read["train_chars"] >= max_chars:
                return


def _train_tokens(documents: Iterator[str], vocab_size: int, pattern: str) -> list[bytes]:
    """The bytes of each token, in the order of the ranks; fewer than asked for when the text runs out of pairs."""
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(documents, vocab_size - len(SPECIAL_TOKENS), pattern=pattern)
    return [bytes(token) for token, _ in sorted(trainer.get_mergeable_ranks(), key=lambda item: item[1])]


def _check_enough_text(tokens: Sequence[bytes], vocab_size: int, *, train_documents: int, train_chars: int) -> None:
    if train_chars == 0:
        raise UserError("there is no text to train the tokenizer on; give a dataset with documents that are not empty")
    missing = vocab_size - len(SPECIAL_TOKENS) - len(tokens)
    if missing > 0:
        raise UserError(
            f"vocab_size {vocab_size} needs {vocab_size - MINIMUM_VOCAB_SIZE} merges, but the text "
            f"({train_documents} documents, {train_chars} characters) gives only {len(tokens) - 256}; "
            f"give more text, or a vocab_size of at most {vocab_size - missing}"
        )


def convert_tokens(
    tokens: Sequence[bytes], *, model_max_length: int = 2048, split_pattern: str = SPLIT_PATTERN
) -> PreTrainedTokenizerFast:
    """The standard tokenizer for byte-level BPE tokens given in the order of their ranks; adds the special tokens.

    `tokenizer(text)` puts `<|bos|>` in front, `add_special_tokens=False` does not. The end of a reply ends
    generation; padding is `<|bos|>`, for padding with the end token would hide real ends from a collator's mask.
    """
    vocabulary = {_to_characters(token): rank for rank, token in enumerate(tokens)}
    assert len(vocabulary) == len(tokens), "two tokens of the same bytes"
    merges = [(_to_characters(left), _to_characters(right)) for left, right in find_merges(tokens)]
    backend = Tokenizer(BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split_pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    backend.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A",
        pair="<|bos|> $A <|bos|> $B",
        special_tokens=[("<|bos|>", backend.token_to_id("<|bos|>"))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|bos|>",
        eos_token="<|assistant_end|>",
        pad_token="<|bos|>",
        extra_special_tokens=[t for t in SPECIAL_TOKENS if t not in ("<|bos|>", "<|assistant_end|>")],
        chat_template=Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8"),
        model_max_length=model_max_length,
        model_input_names=["input_ids", "attention_mask"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def find_merges(tokens: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    """The pair that each token after the 256 bytes was merged from: BPE of its bytes with lower ranks leaves two."""
    ranks = {token: rank for rank, token in enumerate(tokens)}
    merges = []
    for token in tokens[256:]:
        parts = _apply_lower_ranks(token, ranks)
        assert len(parts) == 2, f"{token!r} is no merge of two tokens of lower rank, but of {parts}"
        merges.append((parts[0], parts[1]))
    return merges


def _apply_lower_ranks(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    own_rank = ranks[token]
    parts = [token[i : i + 1] for i in range(len(token))]
    while True:
        pair_ranks = [ranks.get(left + right, own_rank) for left, right in pairwise(parts)]
        lowest = min(pair_ranks, default=own_rank)
        if lowest == own_rank or len(parts) == 2:
            return parts
        at = pair_ranks.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def _to_characters(token: bytes) -> str:
    return "".join(BYTE_CHARACTERS[byte] for byte in token)


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write what AutoTokenizer loads, and `token_bytes.json` (one length per id) beside it."""
    tokenizer.save_pretrained(str(folder))
    write_json(Path(folder) / "token_bytes.json", token_byte_lengths(tokenizer).tolist())


def load_tokenizer(folder: Path | str) -> PreTrainedTokenizerFast:
    """The tokenizer saved in a folder.

    Raises:
        UserError: there is none, it is damaged, or it was not made by `train_tokenizer`.
    """
    if not (Path(folder) / "tokenizer.json").is_file():
        if Path(folder).name == "tokenizer":  # a run's own
            raise UserError(f"{Path(folder).parent} has no tokenizer yet; run recipes/train_tokenizer.py for it first")
        raise UserError(explain_no_model(Path(folder)))
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the Rust parser raises bare Exception
        raise UserError(f"the tokenizer in {folder} is damaged ({error}); train it again") from None
    try:
        special_ids = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
        ordinary_tokens(tokenizer)
    except (KeyError, ValueError):
        special_ids = []
    if special_ids != list(range(len(tokenizer) - len(SPECIAL_TOKENS), len(tokenizer))):
        raise UserError(
            f"the tokenizer in {folder} has no byte-level vocabulary that ends in the special tokens "
            f"{SPECIAL_TOKENS[0]} to {SPECIAL_TOKENS[-1]}; give a folder made by recipes/train_tokenizer.py"
        )
    return tokenizer


def ordinary_tokens(tokenizer: PreTrainedTokenizerFast) -> list[bytes]:
    """The bytes of each id that is not special; these ids come first, so the index is the id and the rank."""
    num_ordinary = len(tokenizer) - len(SPECIAL_TOKENS)
    characters = tokenizer.convert_ids_to_tokens(list(range(num_ordinary)))
    return [bytes(CHARACTER_BYTES[character] for character in token) for token in characters]


def token_byte_lengths(tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """(vocab_size,) int64: the bytes each id stands for, 0 for special tokens.

    Deviation: nanochat takes the UTF-8 length of the decoded token, which counts 3 for a lone part of a character.
    """
    lengths = [len(token) for token in ordinary_tokens(tokenizer)]
    return torch.tensor(lengths + [0] * len(SPECIAL_TOKENS), dtype=torch.int64)


def describe_token_bytes(tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """Minimum, maximum, mean and (sample) standard deviation of the bytes per token, special tokens left out."""
    lengths = token_byte_lengths(tokenizer)[: -len(SPECIAL_TOKENS)]
    return {
        "min": int(lengths.min()),
        "max": int(lengths.max()),
        "mean": lengths.double().mean().item(),
        "std": lengths.double().std().item(),
    }


def read_split_pattern(tokenizer: PreTrainedTokenizerFast) -> str:
    """The pattern that cuts text before merging: of the first step of the pre-tokenizer that `convert_tokens` made."""
    steps = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"]["pretokenizers"]
    return str(steps[0]["pattern"]["Regex"])


def build_encoding(tokenizer: PreTrainedTokenizerFast) -> tiktoken.Encoding:
    """The same ids, several times faster in bulk: `encode_ordinary_batch` never gives special tokens or `<|bos|>`."""
    return tiktoken.Encoding(
        name="chatmodel",
        pat_str=read_split_pattern(tokenizer),
        mergeable_ranks={token: rank for rank, token in enumerate(ordinary_tokens(tokenizer))},
        special_tokens=dict(
            zip(SPECIAL_TOKENS, range(len(tokenizer) - len(SPECIAL_TOKENS), len(tokenizer)), strict=True)
        ),
    )


def calculator_table(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """What `config.calculator` holds, so that the model can read expressions and write results without a tokenizer.

    Keys: `start`, `end`, `output_start`, `output_end` are ids; `pieces` is one line "id<TAB>text" for each token an
    expression can be made of; `output` gives the ids of "-", "." and of one and two digits, which is how the split
    pattern cuts a number: pairs of digits from the left.
    """
    pieces = []
    for token_id, token in enumerate(ordinary_tokens(tokenizer)):
        text = token.decode("latin-1")
        if CALCULATOR_CHARACTERS.issuperset(text):
            pieces.append(f"{token_id}\t{text}")
    return {
        "start": tokenizer.convert_tokens_to_ids("<|python_start|>"),
        "end": tokenizer.convert_tokens_to_ids("<|python_end|>"),
        "output_start": tokenizer.convert_tokens_to_ids("<|output_start|>"),
        "output_end": tokenizer.convert_tokens_to_ids("<|output_end|>"),
        "pieces": "\n".join(pieces),
        "output": {text: tokenizer.encode(text, add_special_tokens=False) for text in CALCULATOR_OUTPUTS},
    }

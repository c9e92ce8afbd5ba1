"""Measure tokenizers beside each other: `python scripts/bench_tokenizer.py --dataset FOLDER`.

Prints Markdown tables: training (ours, on rustbpe, beside the trainer of `tokenizers`, with the same split pattern on
the same text), and encoding with the vocabulary so trained. Peers take turns.
"""

from dataclasses import dataclass, field
from typing import Any

from bench_data import print_table, time_in_turn
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from chatmodel.arguments import parse_arguments
from chatmodel.data.corpus import stream_documents
from chatmodel.data.encoding import Encoder
from chatmodel.runtime import entry_point
from chatmodel.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, train_tokenizer
from chatmodel.workers import count_cores


@dataclass
class BenchArguments:
    """What is measured."""

    dataset: str = field(metadata={"help": "A folder or file of parquet, jsonl or txt; its train split is read."})
    vocab_size: int = field(default=32_768, metadata={"help": "All ids, the nine special tokens included."})
    train_megabytes: float = field(default=60.0, metadata={"help": "Text to train on, in 10^6 characters."})
    encode_megabytes: float = field(default=20.0, metadata={"help": "Text to encode, in 10^6 characters."})
    doc_cap: int = field(default=10_000, metadata={"help": "Characters of one document at most."})
    repeats: int = field(default=3, metadata={"help": "Measurements of each; the median is given."})


def main() -> None:
    (args,) = parse_arguments(BenchArguments)
    print(f"{count_cores()} cores, medians of {args.repeats}\n")
    texts = take_texts(args, args.train_megabytes)
    characters = sum(map(len, texts))

    def train_ours() -> Any:
        return train_tokenizer(texts, args.vocab_size, max_chars=characters, doc_cap=args.doc_cap)

    seconds = time_in_turn(
        {
            "rustbpe, by `train_tokenizer`": train_ours,
            "`tokenizers`, `BpeTrainer`": lambda: train_with_tokenizers(texts, args.vocab_size),
        },
        args.repeats,
    )
    ours = next(iter(seconds.values()))
    print_table(
        [f"training {args.vocab_size:,} tokens, {characters / 1e6:.1f} M characters", "seconds", "ours is faster by"],
        [[name, f"{s:.2f}", f"{s / ours:.2f}x"] for name, s in seconds.items()],
    )
    measure_encoding(train_ours(), take_texts(args, args.encode_megabytes), args.repeats)


def take_texts(args: BenchArguments, megabytes: float) -> list[str]:
    """The first documents, cut as for training."""
    texts: list[str] = []
    missing = megabytes * 1e6
    for text in stream_documents(args.dataset, "train"):
        if missing <= 0:
            break
        texts.append(text[: args.doc_cap])
        missing -= len(texts[-1])
    return texts


def train_with_tokenizers(texts: list[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of the same size, split by the same pattern."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def measure_encoding(tokenizer: Any, texts: list[str], repeats: int) -> None:
    """Print how fast the same ids are had in several ways."""
    encoder = Encoder(tokenizer)
    encoding, backend = encoder.encoding, tokenizer.backend_tokenizer
    tokens = sum(map(len, encoding.encode_ordinary_batch(texts)))
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    seconds = time_in_turn(
        {
            "tiktoken `encode_ordinary_batch`, 1 thread": lambda: encoding.encode_ordinary_batch(texts, num_threads=1),
            "tiktoken `encode_ordinary_batch`, 2 threads": lambda: encoding.encode_ordinary_batch(
                texts, num_threads=2
            ),
            "the store's `Encoder`, one process": lambda: encoder.encode(texts),
            f"`tokenizers` `encode_batch_fast`, {count_cores()} threads": lambda: backend.encode_batch_fast(
                texts, add_special_tokens=False
            ),
        },
        repeats,
    )
    print_table(
        [f"encoding {megabytes:.1f} MB, {tokens / 1e6:.2f} M tokens", "seconds", "MB/s", "10^6 tokens/s"],
        [[name, f"{s:.2f}", f"{megabytes / s:.1f}", f"{tokens / s / 1e6:.2f}"] for name, s in seconds.items()],
    )


if __name__ == "__main__":
    entry_point(main)

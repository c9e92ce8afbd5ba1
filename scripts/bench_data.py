"""Measure the data path beside plain tiktoken: `python scripts/bench_data.py --dataset FOLDER [--tokenizer FOLDER]`.

Prints Markdown tables: the build of a token store (reading, encoding, writing, checksums) beside tiktoken's
`encode_ordinary_batch` on text that lies in memory already, and the rows that training is served. Peers take turns.
"""

import shutil
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from chatmodel.arguments import parse_arguments
from chatmodel.data.corpus import describe_corpus, stream_documents
from chatmodel.data.loading import read_ahead
from chatmodel.data.rows import PACKINGS, PackedRows
from chatmodel.data.shards import Shard, Shards, find_file_shards
from chatmodel.data.store import TokenStore, build_token_store
from chatmodel.runtime import entry_point
from chatmodel.tokenizer import build_encoding, load_tokenizer, train_tokenizer
from chatmodel.workers import count_cores


@dataclass
class BenchArguments:
    """What is measured."""

    dataset: str = field(metadata={"help": "A folder or file of parquet, jsonl or txt; its train split is read."})
    tokenizer: str | None = field(default=None, metadata={"help": "Folder of a tokenizer; by default one is trained."})
    vocab_size: int = field(default=32_768, metadata={"help": "Of the tokenizer that is trained."})
    max_megabytes: float = field(default=150.0, metadata={"help": "Text to encode at most, in 10^6 bytes."})
    repeats: int = field(default=3, metadata={"help": "Measurements of each; the median is given."})
    threads: int = field(default=2, metadata={"help": "Threads of tiktoken, and workers of ours."})
    sequence_length: int = field(default=2048, metadata={"help": "Tokens of a row."})
    batch_size: int = field(default=32, metadata={"help": "Rows of a batch."})
    batches: int = field(default=200, metadata={"help": "Batches of a measurement."})


def main() -> None:
    (args,) = parse_arguments(BenchArguments)
    print(f"{count_cores()} cores, {args.threads} threads or workers, medians of {args.repeats}\n")
    tokenizer = (
        load_tokenizer(args.tokenizer)
        if args.tokenizer
        else train_tokenizer(
            stream_documents(args.dataset, "train"), args.vocab_size, max_chars=100_000_000, doc_cap=10_000
        )
    )
    work = Path(tempfile.mkdtemp(prefix="bench_data."))
    try:
        store = measure_build(args, tokenizer, work)
        measure_rows(store, args)
        measure_check(store, args)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def measure_build(args: BenchArguments, tokenizer: Any, work: Path) -> TokenStore:
    """Print how fast a store is built from whole files, beside their text encoded from memory; returns the store."""
    split = find_file_shards(args.dataset, "train", text_column="text")
    texts: list[str] = []
    files: list[Shard] = []
    for shard in split.files:
        if sum(map(len, texts)) >= args.max_megabytes * 1e6:
            break
        files.append(shard)
        texts += Shards((shard,), split.selection).read()
    documents = replace(split, files=tuple(files))
    encoding = build_encoding(tokenizer)
    facts = describe_corpus(args.dataset)

    def build() -> None:
        shutil.rmtree(work / "train", ignore_errors=True)
        build_token_store(documents, tokenizer, work / "train", dataset=facts, split="train", num_workers=args.threads)

    seconds = time_in_turn(
        {
            f"tiktoken `encode_ordinary_batch`, {args.threads} threads, text in memory": lambda: (
                encoding.encode_ordinary_batch(texts, num_threads=args.threads)
            ),
            f"token store from {len(files)} files, {args.threads} workers": build,
        },
        args.repeats,
    )
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    peer = next(iter(seconds.values()))
    print_table(
        [f"vocabulary {len(tokenizer):,}, {megabytes:.1f} MB of text", "seconds", "MB/s", "ratio"],
        [[name, f"{s:.2f}", f"{megabytes / s:.1f}", f"{peer / s:.2f}"] for name, s in seconds.items()],
    )
    return TokenStore.open(work / "train")


def measure_rows(store: TokenStore, args: BenchArguments) -> None:
    """Print how fast batches are served, on a store that lies in the page cache."""

    def rows(packing: str) -> PackedRows:
        return PackedRows(store, sequence_length=args.sequence_length, packing=packing)

    sources: dict[str, Iterator[Any]] = {}
    for packing in PACKINGS:
        sources[f"{packing}, `DataLoader`"] = iter(DataLoader(rows(packing), batch_size=args.batch_size))
        batches = rows(packing).batches(args.batch_size)
        sources[f"{packing}, `batches` read ahead"] = read_ahead(batches, source=str(store.folder))
    # A deque without room takes items and forgets them.
    seconds = time_in_turn(
        {
            name: partial(lambda source: deque(islice(source, args.batches), maxlen=0), source)
            for name, source in sources.items()
        },
        args.repeats,
    )
    tokens = args.batches * args.batch_size * args.sequence_length
    print_table(
        [f"batches of ({args.batch_size}, {args.sequence_length})", "seconds", "10^6 tokens/s"],
        [[name, f"{s:.3f}", f"{tokens / s / 1e6:.1f}"] for name, s in seconds.items()],
    )


def measure_check(store: TokenStore, args: BenchArguments) -> None:
    """Print what it takes to compare a store with its checksums."""
    name = f"checksums of {store.tokens.nbytes / 1e6:.0f} MB"
    seconds = time_in_turn({name: lambda: TokenStore.open(store.folder, check_hash=True)}, args.repeats)
    print_table(
        ["opening a store", "seconds", "GB/s"],
        [[name, f"{s:.3f}", f"{store.tokens.nbytes / s / 1e9:.2f}"] for name, s in seconds.items()],
    )


def time_in_turn(peers: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each, all of them measured once before any is measured again."""
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    for _ in range(repeats):
        for name, peer in peers.items():
            began = time.perf_counter()
            peer()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """A Markdown table, the first column to the left."""
    for cells in (header, ["---", *["---:"] * (len(header) - 1)], *rows):
        print("|", " | ".join(cells), "|")
    print()


if __name__ == "__main__":
    entry_point(main)

"""Say how much of each benchmark stands in the training text.

    python scripts/check_contamination.py --text DATASET --eval_bundle eval_bundle.zip --chatcore FOLDER

Text may be a data set (as for pretraining), a token store, or the mixture of a recipe's YAML file; several add up.
With the results of an evaluation, accuracies on clean and on found examples stand beside each other.
"""

import argparse
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from chatmodel.conversations.mixtures import open_entry, parse_mixture
from chatmodel.data.corpus import stream_documents
from chatmodel.data.store import TokenStore
from chatmodel.evaluation.contamination import (
    RULES,
    build_index,
    read_benchmarks,
    read_decisions,
    render_contamination,
    report_contamination,
    scan_texts,
    write_messages,
)
from chatmodel.runtime import UserError, entry_point, read_json, write_json
from chatmodel.tokenizer import load_tokenizer
from chatmodel.workers import count_cores


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", default=[], help="data sets: a folder, a file, owner/name or 'embedded'")
    parser.add_argument("--store", nargs="+", type=Path, default=[], help="token stores, e.g. runs/cpu/data/train")
    parser.add_argument("--tokenizer", type=Path, help="the folder of the stores' tokenizer")
    parser.add_argument("--mixture", nargs="+", type=Path, default=[], help="YAML files with a 'mixture'")
    parser.add_argument("--conversations", nargs="+", default=[], help="files or folders of conversations")
    parser.add_argument("--eval_bundle", type=Path, help="CORE's data: a zip file or a folder")
    parser.add_argument("--chatcore", type=Path, help="ChatCORE's data")
    parser.add_argument("--results", nargs="+", type=Path, default=[], help="what recipes/eval.py wrote")
    parser.add_argument("--num_workers", type=int, default=count_cores(), help="threads; by default one per core")
    parser.add_argument("--output", type=Path, help="the JSON file to write")
    return parser.parse_args()


def read_text(args: argparse.Namespace) -> Iterator[str]:
    """All training text that was named."""
    for name in args.text:
        yield from stream_documents(name, "train")
    if args.store and args.tokenizer is None:
        raise UserError("a token store needs the tokenizer it was made with; give --tokenizer runs/<name>/tokenizer")
    for folder in args.store:
        tokenizer, store = load_tokenizer(args.tokenizer), TokenStore.open(folder)
        for start, end in pairwise(store.offsets.tolist()):
            yield tokenizer.decode(store.tokens[start:end].tolist(), skip_special_tokens=True)
    entries: list[Any] = [{"name": Path(name).name, "path": name} for name in args.conversations]
    for path in args.mixture:
        entries += (yaml.safe_load(path.read_text()) or {}).get("mixture") or []
    for entry in parse_mixture(entries) if entries else []:
        source = open_entry(entry, folder=args.chatcore)
        yield from (write_messages(source.read(row)) for row in range(source.count))


def main() -> None:
    args = parse_options()
    if not (args.text or args.store or args.mixture or args.conversations):
        raise UserError("there is no training text; name some with --text, --store, --mixture or --conversations")
    if args.eval_bundle is None and args.chatcore is None:
        raise UserError("there is no benchmark; give --eval_bundle, --chatcore or both")
    began = time.perf_counter()
    benchmarks = read_benchmarks(args.eval_bundle, args.chatcore)
    indices = [build_index(benchmarks, n) for n in sorted({rule.n for rule in RULES}, reverse=True)]
    indexed = time.perf_counter()
    texts = tqdm(read_text(args), desc="training text", unit=" documents", unit_scale=True, disable=None)
    totals = scan_texts(texts, indices, num_workers=args.num_workers)
    decisions = {
        name: right for path in args.results for name, right in read_decisions(read_json(path)["metrics"]).items()
    }
    report = report_contamination(benchmarks, indices, decisions=decisions)
    seconds = {"index": indexed - began, "text": time.perf_counter() - indexed}
    print(render_contamination(report, totals))
    print(f"Benchmarks indexed in {seconds['index']:.0f} s, text read in {seconds['text']:.0f} s.")
    if args.output is not None:
        write_json(args.output, {"text": totals, "seconds": seconds, "tasks": report})


if __name__ == "__main__":
    entry_point(main)

"""Train the tokenizer of a run: `python recipes/train_tokenizer.py --config recipes/configs/cpu/tokenizer.yaml`."""

from dataclasses import dataclass, field
from pathlib import Path

from chatmodel.arguments import parse_arguments
from chatmodel.data.corpus import describe_corpus, stream_documents
from chatmodel.runs import Run
from chatmodel.runtime import entry_point, logger
from chatmodel.tokenizer import build_encoding, save_tokenizer, train_and_measure
from chatmodel.tokenizer_comparison import SAMPLE_TEXTS, compare_token_counts, join_documents


@dataclass
class TokenizerArguments:
    """What to train the tokenizer on, and how large it becomes."""

    run_dir: str = field(metadata={"help": "Folder of the run, e.g. runs/cpu."})
    dataset: str = field(
        default="embedded", metadata={"help": "embedded, a folder or file (parquet, jsonl, txt), or a Hub name."}
    )
    text_column: str = field(default="text", metadata={"help": "The column or field that holds the text."})
    vocab_size: int = field(default=32_768, metadata={"help": "All ids, the nine special tokens included."})
    max_chars: int = field(default=1_000_000_000, metadata={"help": "Characters to read at most."})
    split: str = field(
        default="chatmodel", metadata={"help": "How text is cut first: 'chatmodel', or 'qwen2' for llama.cpp."}
    )
    doc_cap: int = field(default=10_000, metadata={"help": "Characters to read of one document at most."})
    sequence_length: int = field(default=2048, metadata={"help": "Context of the model; becomes model_max_length."})
    comparison_chars: int = field(
        default=4_000_000, metadata={"help": "Characters of each split to compare with GPT-2 and GPT-4 on."}
    )


def main() -> None:
    (args,) = parse_arguments(TokenizerArguments)
    stage = Run(Path(args.run_dir)).begin("tokenizer")
    if stage is None:
        return
    tokenizer, statistics = train_and_measure(
        stream_documents(args.dataset, "train", text_column=args.text_column),
        args.vocab_size,
        max_chars=args.max_chars,
        doc_cap=args.doc_cap,
        model_max_length=args.sequence_length,
        split=args.split,
    )
    save_tokenizer(tokenizer, stage.folder)
    logger.info("tokenizer: %s ids trained in %.1f s", f"{args.vocab_size:,}", statistics["train_seconds"])
    samples = {}
    for split in ("train", "validation"):
        documents = stream_documents(args.dataset, split, text_column=args.text_column)
        samples[split] = join_documents(documents, num_chars=args.comparison_chars)
    encoding = build_encoding(tokenizer)
    comparison = compare_token_counts(SAMPLE_TEXTS | samples, lambda text: len(encoding.encode_ordinary(text)))
    if comparison["not_run"]:
        reason = comparison["not_run"]
        logger.info("tokenizer: not compared with GPT-2 and GPT-4: %s; the report says how to get them", reason)
    stage.finish(statistics | {"comparison": comparison, "dataset": describe_corpus(args.dataset)})


if __name__ == "__main__":
    entry_point(main)

"""Make a folder of conversations that stand in for the Hub's, for `--conversations`: seconds on a CPU.

It takes files of conversations (`messages` and `source`), ARC, MMLU and GSM8K from the folder of ChatCORE's data sets
or the Hub, and a word list, and writes what `recipes/configs/h200` names: multiple choice questions with letters, each
several times with its choices in another order; arithmetic with calculator calls; the other conversations as they
are; and `words.txt.gz`, whose held-out fifth appears in none of them.
"""

import gzip
import json
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chatmodel.arguments import parse_arguments
from chatmodel.conversations.calculator_calls import add_calls
from chatmodel.conversations.datasets import load_task_rows, load_word_list, task_messages
from chatmodel.conversations.files import convert_row, read_rows
from chatmodel.conversations.generated import GENERATED_TASKS, generate_conversation, select_words
from chatmodel.conversations.multiple_choice import (
    ChoiceQuestion,
    pair_with_others,
    read_listed_options,
    read_public_question,
    vary_choices,
)
from chatmodel.conversations.render import Messages
from chatmodel.data.words import WORD, is_held_out
from chatmodel.runtime import UserError, entry_point, logger, write_json

# data set, its splits, and how often each question is asked with its choices in another order
PUBLIC_QUESTIONS = (("ARC-Easy", ("train",), 6), ("ARC-Challenge", ("train",), 6), ("MMLU", ("dev", "validation"), 3))
LISTED_VARIANTS, PAIRED_VARIANTS = 4, 3
WORDS_IN_TEXT = re.compile(r"[a-z]+")
GENERATED_SAMPLES = 5000  # of each generated task, to see which words it uses


@dataclass
class PreparationArguments:
    """Where the conversations come from and go to."""

    output: Path = field(metadata={"help": "Folder to write; give it to the pipeline as --conversations."})
    chat: Path = field(metadata={"help": "Folder of jsonl(.gz) or parquet files of conversations."})
    chatcore: Path | None = field(default=None, metadata={"help": "Folder of ChatCORE's data sets; else the Hub."})
    seed: str = field(default="choices", metadata={"help": "Decides the order of choices."})


def collect_choices(
    files: dict[str, list[dict[str, Any]]], args: PreparationArguments
) -> Iterator[tuple[str, Messages]]:
    """(source, conversation) of every multiple choice question, several times each."""
    listed: list[ChoiceQuestion] = []
    paired: list[tuple[str, Messages]] = []
    for rows in files.values():
        for row in rows:
            messages = convert_row(row)
            question = read_listed_options(messages)
            if question is not None:
                listed.append(question)
            elif str(row.get("source", "")).startswith("openstax"):
                paired.append((row["source"], messages))
    for name, splits, variants in PUBLIC_QUESTIONS:
        questions = [
            read_public_question(name, row) for split in splits for row in load_task_rows(name, split, args.chatcore)
        ]
        yield from ((name, messages) for messages in vary_choices(questions, variants, seed=args.seed))
    yield from (("listed", messages) for messages in vary_choices(listed, LISTED_VARIANTS, seed=args.seed))
    questions = pair_with_others(paired)
    yield from (("paired", messages) for messages in vary_choices(questions, PAIRED_VARIANTS, seed=args.seed))


def list_words(conversations: Iterable[Messages]) -> set[str]:
    """Every run of letters in any message, in lower case."""
    words: set[str] = set()
    for messages in conversations:
        for message in messages:
            content = message["content"]
            parts = [content] if isinstance(content, str) else [part["text"] for part in content]
            words.update(WORDS_IN_TEXT.findall(" ".join(parts).lower()))
    return words


def write_lines(path: Path, lines: Iterable[str]) -> None:
    # Without a time stamp or a name the same content is the same file.
    with path.open("wb") as raw, gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as packed:
        packed.writelines(f"{line}\n".encode() for line in lines)


def main() -> None:
    (args,) = parse_arguments(PreparationArguments)
    output, chat = Path(args.output), Path(args.chat)
    args.chatcore = None if args.chatcore is None else Path(args.chatcore)
    paths = sorted(path for path in chat.glob("*") if path.name.endswith((".jsonl", ".jsonl.gz", ".parquet")))
    if not paths:
        raise UserError(f"chat {chat} holds no jsonl, jsonl.gz or parquet file; give a folder of conversations")
    files = {path.name.partition(".")[0]: list(read_rows(path).rows) for path in paths}
    choices = list(collect_choices(files, args))
    random.Random(args.seed).shuffle(choices)
    made = {"multiple_choice": choices}
    for name, rows in files.items():
        made[name] = [(str(row.get("source", name)), add_calls(convert_row(row))) for row in rows]
    output.mkdir(parents=True, exist_ok=True)
    for name, conversations in made.items():
        lines = (json.dumps({"messages": m, "source": s}, ensure_ascii=False) for s, m in conversations)
        write_lines(output / f"{name}.jsonl.gz", lines)
        logger.info("%s: %d conversations", name, len(conversations))
    words = [word for word in load_word_list(args.chatcore) if WORD.fullmatch(word)]
    seen = list_words(messages for conversations in made.values() for _, messages in conversations)
    seen |= list_words(task_messages("GSM8K", row) for row in load_task_rows("GSM8K", "train", args.chatcore))
    for name in GENERATED_TASKS:
        chosen = select_words(words, "train")
        seen |= list_words(
            generate_conversation(name, i, split="train", words=chosen) for i in range(GENERATED_SAMPLES)
        )
    kept = [word for word in words if not (is_held_out(word) and word in seen)]
    write_lines(output / "words.txt.gz", kept)
    held_out = sum(map(is_held_out, kept))
    logger.info("words: %d to train on, %d held out that no conversation holds", len(kept) - held_out, held_out)
    counts = {name: len(conversations) for name, conversations in made.items()}
    write_json(output / "counts.json", {**counts, "words": len(kept), "held_out_words": held_out})


if __name__ == "__main__":
    entry_point(main)

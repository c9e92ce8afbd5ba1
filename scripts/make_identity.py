"""Write who-are-you conversations from a file of facts: `scripts/make_identity.py facts.yaml --output identity.jsonl`.

The file gives any of name, kind, maker, skills, training, limits, date, size, languages, cannot, home, and `questions`
of your own, each of the form {ask: ["...", "..."], reply: "..."}. A mixture makes the same conversations without a
file from {name: Identity, facts: facts.yaml, turns: 3}.
"""

import argparse
import json
from pathlib import Path

from chatmodel.conversations.generated import SPLITS, generate_conversation
from chatmodel.conversations.identity import load_identity
from chatmodel.runtime import UserError, entry_point, logger


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("facts", type=Path, help="a YAML file")
    parser.add_argument("--rows", type=int, default=1000, help="conversations (1000)")
    parser.add_argument("--turns", type=int, default=3, help="at most so many questions in one (3)")
    parser.add_argument("--seed", type=int, default=0, help="another number gives other conversations")
    parser.add_argument("--split", choices=SPLITS, default="train", help="'test': questions that training never asks")
    parser.add_argument(
        "--output", type=Path, required=True, help="the .jsonl file to write, a row of messages a line"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_options()
    for name in ("rows", "turns"):
        if getattr(args, name) < 1:
            raise UserError(f"{name}={getattr(args, name)} must be at least 1")
    identity = load_identity(args.facts)
    first = args.seed * args.rows
    rows = [
        generate_conversation("Identity", index, split=args.split, identity=identity, turns=args.turns)
        for index in range(first, first + args.rows)
    ]
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        with args.output.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({"messages": messages}, ensure_ascii=False) + "\n" for messages in rows)
    except OSError as error:
        raise UserError(f"{args.output} cannot be written ({error.strerror}); give another --output") from None
    logger.info("%s: %d conversations, %d of them different", args.output, len(rows), len({str(row) for row in rows}))


if __name__ == "__main__":
    entry_point(main)

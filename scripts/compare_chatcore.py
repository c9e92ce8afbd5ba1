"""Are ChatCORE's prompts and decisions those of nanochat's own code at c75fe54, example by example?

    python scripts/compare_chatcore.py --nanochat CHECKOUT --model runs/cpu/sft --chatcore FOLDER

Prompts are compared as ids, the letter chosen in ARC and MMLU on the same model, answers and programs by what is made
of given replies. The last line is JSON.
"""

import argparse
import importlib
import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import chatmodel  # noqa: F401 (makes the model's classes known to Transformers)
from chatmodel.conversations.answers import check_answer
from chatmodel.conversations.datasets import load_word_list
from chatmodel.conversations.files import read_rows
from chatmodel.evaluation.chat_tasks import ChatExample, is_categorical, load_chat_examples, render_chat_prompts
from chatmodel.evaluation.chatcore import ChatLimits, decide_chat_task
from chatmodel.evaluation.humaneval import build_program
from chatmodel.runtime import UserError, entry_point
from chatmodel.tokenizer import build_encoding

# Of nanochat: module, class and file of each task; their constructors would download.
TASKS = {
    "ARC-Easy": ("arc", "ARC", "arc_easy_test"),
    "ARC-Challenge": ("arc", "ARC", "arc_challenge_test"),
    "MMLU": ("mmlu", "MMLU", "mmlu_test"),
    "GSM8K": ("gsm8k", "GSM8K", "gsm8k_test"),
    "HumanEval": ("humaneval", "HumanEval", "humaneval_test"),
    "SpellingBee": ("spellingbee", "SpellingBee", None),
}
REPLIES = ("#### 3", "#### 1,000 x", "none", "<|python_start|>1+1<|python_end|> #### -5.0")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanochat", type=Path, required=True, help="a checkout of karpathy/nanochat at c75fe54")
    parser.add_argument("--model", type=Path, required=True, help="a model folder with its tokenizer")
    parser.add_argument("--chatcore", type=Path, required=True, help="the data sets' files")
    parser.add_argument("--max_per_task", type=int, default=100)
    return parser.parse_args()


def build_theirs(name: str, folder: Path) -> Any:
    """nanochat's task object over the same rows, shuffled as its constructor does."""
    module, cls, file = TASKS[name]
    made = getattr(importlib.import_module(f"tasks.{module}"), cls).__new__
    task = made(getattr(sys.modules[f"tasks.{module}"], cls))
    task.start, task.stop, task.step = 0, None, 1
    if file is None:
        task.size, task.split, task.words = 256, "test", load_word_list(folder)
    else:
        path = next(path for path in sorted(folder.iterdir()) if path.name.startswith(f"{file}.jsonl"))
        task.ds = Dataset.from_list(list(read_rows(path).rows)).shuffle(seed=42)
    return task


def choose_as_nanochat(task: Any, index: int, model: Any, tokenizer: Any) -> bool:
    """Whether the likeliest of the letters is right, by whole logits of one prompt."""
    conversation = task[index]
    ids = torch.tensor([tokenizer.render_for_completion(conversation)], device=model.device)
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[0, -1].float()
    letters = conversation["letters"]
    best = logits[[tokenizer.encode(letter)[0] for letter in letters]].argmax().item()
    return bool(task.evaluate(conversation, letters[best]))


def count_equal_programs(task: Any, examples: list[ChatExample]) -> list[int]:
    """Equal programs that both make of the reference solution, plain and in a block of code."""
    module = sys.modules["tasks.humaneval"]
    seen: dict[str, str] = {}

    def note(program: str) -> SimpleNamespace:
        seen["program"] = program
        return SimpleNamespace(success=True)

    module.execute_code = note  # type: ignore[attr-defined]
    equal = []
    for index, example in enumerate(examples):
        solution = example.messages[-1]["content"]
        for reply in (solution, f"Sure!\n```python\n{solution}\n```\nbye"):
            task.evaluate(task[index], reply)
            equal.append(seen["program"] == build_program(example.row, reply))
    return [sum(equal), len(equal)]


def compare_answers(task: Any, examples: list[ChatExample]) -> list[int]:
    """Equal judgements of made-up replies and of other examples' reference replies."""
    replies = [*REPLIES, *("".join(part["text"] for part in e.messages[-1]["content"]) for e in examples[:20])]
    equal = [
        check_answer(example.messages, reply) == bool(task.evaluate(task[index], reply))
        for index, example in enumerate(examples[:20])
        for reply in replies
    ]
    return [sum(equal), len(equal)]


def compare(name: str, options: argparse.Namespace, model: Any, tokenizer: Any, theirs: Any) -> dict[str, list[int]]:
    """[equal, compared] of prompts and of what is decided."""
    task = build_theirs(name, options.chatcore)
    examples = load_chat_examples(name, folder=options.chatcore, max_per_task=options.max_per_task)
    prompts = render_chat_prompts(tokenizer, [example.messages for example in examples])
    equal = [theirs.render_for_completion(task[index]) == ids for index, ids in enumerate(prompts)]
    row = {"prompts": [sum(equal), len(equal)]}
    if is_categorical(name):
        limits = ChatLimits(max_per_task=options.max_per_task, batch_tokens=4096)
        ours = decide_chat_task(name, model, tokenizer, folder=options.chatcore, limits=limits)
        other = [choose_as_nanochat(task, index, model, theirs) for index in range(len(examples))]
        row["decisions"] = [sum(a == b for a, b in zip(ours, other, strict=True)), len(ours)]
    elif name == "HumanEval":
        row["programs"] = count_equal_programs(task, examples)
    else:
        row["judgements"] = compare_answers(task, examples)
    return row


def main() -> None:
    logging.getLogger("chatmodel").setLevel(logging.WARNING)
    options = parse_options()
    if not (options.nanochat / "tasks" / "spellingbee.py").exists():
        raise UserError(f"{options.nanochat} holds no tasks/spellingbee.py; give a checkout of karpathy/nanochat")
    sys.path.insert(0, str(options.nanochat))
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    model.config.max_position_embeddings = max(2048, model.config.max_position_embeddings)  # nanochat cuts there
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    theirs = importlib.import_module("nanochat.tokenizer").RustBPETokenizer(build_encoding(tokenizer), "<|bos|>")
    rows = {}
    for name in TASKS:
        rows[name] = compare(name, options, model, tokenizer, theirs)
        print(name, rows[name], flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    entry_point(main)

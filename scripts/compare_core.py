"""Are CORE's decisions those of nanochat's own core_eval.py, example by example, on the same model?

    python scripts/compare_core.py --nanochat CHECKOUT --model runs/cpu/base --eval_bundle eval_bundle.zip

Both read the same data and the same tokenizer. nanochat's side is slow, so its decisions are kept in `--reference`.
"""

import argparse
import importlib
import json
import logging
import random
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import chatmodel  # noqa: F401 (makes the model's classes known to Transformers)
from chatmodel.evaluation.core import CoreSettings, is_right, score_tasks
from chatmodel.evaluation.core_tasks import CoreTask, load_core_tasks
from chatmodel.runtime import UserError, entry_point, write_json

Example = dict[str, Any]


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanochat", type=Path, required=True, help="a checkout of karpathy/nanochat at c75fe54")
    parser.add_argument("--model", type=Path, required=True, help="a model folder with its tokenizer")
    parser.add_argument("--eval_bundle", type=Path, required=True, help="CORE's data, a zip file")
    parser.add_argument("--max_per_task", type=int, default=200)
    parser.add_argument("--random_weights", action="store_true", help="draw every parameter anew from N(0, 0.02)")
    parser.add_argument("--bf16", action="store_true", help="run ours in bf16 too, and list what changes")
    parser.add_argument(
        "--reference", type=Path, help="where nanochat's decisions are kept, or read if they are there"
    )
    parser.add_argument("--reference_only", action="store_true", help="stop when nanochat's decisions are made")
    parser.add_argument("--batch_tokens", type=int, default=4096)
    parser.add_argument("--output", type=Path, help="a JSON file for the comparison")
    return parser.parse_args()


def load_model(folder: Path, *, random_weights: bool) -> Any:
    """In fp32; a random one has no zeroed output, under which all choices would tie."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if random_weights:
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.data.normal_(0.0, 0.02, generator=generator)
    return model


class TokenizerForNanochat:
    """The two calls that core_eval.py makes."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def get_bos_token_id(self) -> int:
        return int(self.tokenizer.bos_token_id)

    def __call__(self, texts: list[str], prepend: int) -> list[list[int]]:
        encoded = self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)
        return [[prepend, *ids] for ids in encoded["input_ids"]]


class ModelForNanochat:
    """Called with ids it gives logits."""

    max_seq_len = None

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, use_cache=False).logits.float()


def read_official(bundle: Path, max_per_task: int) -> Iterator[tuple[str, list[Example], Example]]:
    """(label, examples, settings) of each task, read as scripts/base_eval.py reads them."""
    root = zipfile.Path(bundle) / "eval_bundle"
    for entry in yaml.safe_load((root / "core.yaml").read_text(encoding="utf-8"))["icl_tasks"]:
        lines = (root / "eval_data" / entry["dataset_uri"]).read_text(encoding="utf-8").strip().split("\n")
        examples = [json.loads(line) for line in lines]
        random.Random(1337).shuffle(examples)
        settings = {
            "task_type": entry["icl_task_type"],
            "num_fewshot": entry["num_fewshot"][0],
            "continuation_delimiter": entry.get("continuation_delimiter", " "),
        }
        yield entry["label"], examples[:max_per_task], settings


def decide_as_nanochat(options: argparse.Namespace, model: Any, tokenizer: Any) -> Example:
    """nanochat's decisions on each task, and its CPU seconds; each task is kept as soon as it is done."""
    done: Example = (
        json.loads(options.reference.read_text()) if options.reference and options.reference.exists() else {}
    )
    sys.path.insert(0, str(options.nanochat))
    core_eval = importlib.import_module("nanochat.core_eval")
    device = str(next(model.parameters()).device)
    given, taken = ModelForNanochat(model), TokenizerForNanochat(tokenizer)
    for label, examples, settings in read_official(options.eval_bundle, options.max_per_task):
        if label in done:
            continue
        started, began = time.process_time(), time.perf_counter()
        right = [
            bool(core_eval.evaluate_example(index, given, taken, examples, device, settings))
            for index in range(len(examples))
        ]
        seconds = {"cpu_seconds": time.process_time() - started, "seconds": time.perf_counter() - began}
        done[label] = {"right": right, **seconds}
        print(f"nanochat {label}: {sum(right)} of {len(right)}, {seconds['cpu_seconds']:.1f} CPU s", flush=True)
        if options.reference:
            write_json(options.reference, done)
    return done


@dataclass(frozen=True)
class Decisions:
    """Whether each example is right, and the mean loss of each of its choices."""

    right: list[bool]
    losses: list[list[float]]


def score_task(options: argparse.Namespace, model: Any, tokenizer: Any, task: CoreTask) -> Decisions:
    """Our own decisions."""
    settings = CoreSettings(batch_tokens=options.batch_tokens)
    scores = list(score_tasks(model, tokenizer, [task], settings=settings))
    golds = [example.get("gold") for example in task.examples]
    right = [is_right(task.kind, group, gold) for group, gold in zip(scores, golds, strict=True)]
    return Decisions(right, [[score.mean_loss for score in group] for group in scores])


def find_margin(kind: str, losses: list[float], gold: int | None) -> float | None:
    """How far the right choice is from the best other one, in nats a token; None for language modelling."""
    if kind == "language_modeling" or gold is None:
        return None
    return abs(min(loss for index, loss in enumerate(losses) if index != gold) - losses[gold])


def compare(options: argparse.Namespace, model: Any, tokenizer: Any, reference: Example) -> Example:
    """Per task how many decisions are equal, ours in fp32 beside nanochat's, and in bf16 beside ours in fp32."""
    tasks: Example = {}
    for task in load_core_tasks(options.eval_bundle, max_per_task=options.max_per_task):
        began = time.process_time()
        fp32 = score_task(options, model, tokenizer, task)
        row: Example = {"n": len(fp32.right), "cpu_seconds": time.process_time() - began}
        theirs = reference[task.label]
        row["nanochat_cpu_seconds"] = theirs["cpu_seconds"]
        row["differ"] = [
            {"index": index, "margin": find_margin(task.kind, fp32.losses[index], task.examples[index].get("gold"))}
            for index, (ours, other) in enumerate(zip(fp32.right, theirs["right"], strict=True))
            if ours != other
        ]
        if options.bf16:
            with torch.autocast(next(model.parameters()).device.type, torch.bfloat16):
                bf16 = score_task(options, model, tokenizer, task)
            row["bf16_differ"] = [
                {"index": index, "fp32_margin": find_margin(task.kind, fp32.losses[index], gold)}
                for index, gold in enumerate(example.get("gold") for example in task.examples)
                if bf16.right[index] != fp32.right[index]
            ]
        tasks[task.label] = row
        equal = row["n"] - len(row["differ"])
        speed = f"{row['cpu_seconds']:.1f} CPU s, nanochat {row['nanochat_cpu_seconds']:.1f}"
        extra = f", bf16 differs in {len(row['bf16_differ'])}" if options.bf16 else ""
        print(f"{task.label}: {equal} of {row['n']} equal, {speed}{extra}", flush=True)
    return tasks


def main() -> None:
    logging.getLogger("chatmodel").setLevel(logging.WARNING)
    options = parse_options()
    if not (options.nanochat / "nanochat" / "core_eval.py").exists():
        raise UserError(f"{options.nanochat} holds no nanochat/core_eval.py; give a checkout of karpathy/nanochat")
    model = load_model(options.model, random_weights=options.random_weights)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    with torch.no_grad():
        reference = decide_as_nanochat(options, model, tokenizer)
        if options.reference_only:
            return
        tasks = compare(options, model, tokenizer, reference)
    total = sum(row["n"] for row in tasks.values())
    differ = sum(len(row["differ"]) for row in tasks.values())
    summary = {
        "decisions": total,
        "equal": total - differ,
        "cpu_seconds": sum(row["cpu_seconds"] for row in tasks.values()),
        "nanochat_cpu_seconds": sum(row["nanochat_cpu_seconds"] for row in tasks.values()),
    }
    print(json.dumps(summary))
    if options.output:
        write_json(options.output, {**summary, "tasks": tasks})


if __name__ == "__main__":
    entry_point(main)

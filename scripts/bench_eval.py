"""How fast is CORE? Our scorer on a model, beside nanochat's own loop on the same model if a checkout is given.

    python scripts/bench_eval.py --depth 8 --tokenizer DIR --eval_bundle eval_bundle.zip --max_per_task 100
    python scripts/bench_eval.py --model runs/cpu/base --eval_bundle eval_bundle.zip --nanochat CHECKOUT

Seconds are of rendering, encoding and scoring, without loading the model; the first task also warms the device up. The
last line is JSON.
"""

import argparse
import importlib
import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from compare_core import TokenizerForNanochat
from transformers import AutoModelForCausalLM, AutoTokenizer

from chatmodel import GPTForCausalLM
from chatmodel.devices import choose_device
from chatmodel.environment import describe_environment
from chatmodel.evaluation.bundle import find_bundle
from chatmodel.evaluation.core import CoreSettings, decide_tasks
from chatmodel.evaluation.core_tasks import CoreTask, load_core_tasks
from chatmodel.evaluation.stages import BATCH_TOKENS
from chatmodel.runtime import UserError, entry_point
from chatmodel.scaling import plan_run

Row = dict[str, Any]


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model folder with its tokenizer")
    parser.add_argument("--depth", type=int, help="instead: a random model of this depth; give --tokenizer")
    parser.add_argument("--tokenizer", type=Path, help="with --depth: a folder with a tokenizer")
    parser.add_argument("--eval_bundle", required=True, help="CORE's data: a zip file, a folder or an address")
    parser.add_argument("--max_per_task", type=int, help="examples per task; all if left out")
    parser.add_argument(
        "--precision", choices=["fp32", "autocast", "bf16"], help="bf16: weights too; by device if unset"
    )
    parser.add_argument("--batch_tokens", type=int, help="tokens in a padded batch; by device if unset")
    parser.add_argument("--unshared", action="store_true", help="compute shared beginnings for each choice anew")
    parser.add_argument("--nanochat", type=Path, help="a checkout of karpathy/nanochat, for its own loop")
    return parser.parse_args()


def load_any(options: argparse.Namespace) -> tuple[Any, Any]:
    if options.model is not None:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
        return model, AutoTokenizer.from_pretrained(options.model)
    if options.depth is None or options.tokenizer is None:
        raise UserError("give --model, or --depth and --tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    model = GPTForCausalLM(plan_run(options.depth, vocab_size=len(tokenizer)).model_config())
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.02)
    return model, tokenizer


def measure_ours(model: Any, tokenizer: Any, tasks: list[CoreTask], settings: CoreSettings) -> list[Row]:
    rows, cpu = [], time.process_time()
    for task, right, seconds in decide_tasks(model, tokenizer, tasks, settings=settings):
        now = time.process_time()
        rows.append(
            {"task": task.label, "n": len(right), "seconds": seconds, "cpu_seconds": now - cpu, "right": right}
        )
        cpu = now
    return rows


def measure_nanochat(checkout: Path, model: Any, tokenizer: Any, tasks: list[CoreTask]) -> Iterator[Row]:
    sys.path.insert(0, str(checkout))
    core_eval = importlib.import_module("nanochat.core_eval")
    device = str(next(model.parameters()).device)
    taken = TokenizerForNanochat(tokenizer)

    def given(ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, use_cache=False).logits

    for task in tasks:
        settings = {
            "task_type": task.kind,
            "num_fewshot": task.num_fewshot,
            "continuation_delimiter": task.delimiter,
        }
        began, cpu = time.perf_counter(), time.process_time()
        right = [
            bool(core_eval.evaluate_example(index, given, taken, task.examples, device, settings))
            for index in range(len(task.examples))
        ]
        seconds = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}
        yield {"task": task.label, "n": len(right), **seconds, "right": right}


def add_up(rows: list[Row]) -> Row:
    total = {key: sum(row[key] for row in rows) for key in ("n", "seconds", "cpu_seconds")}
    return total | {"examples_per_second": total["n"] / total["seconds"]}


def show_rows(ours: list[Row], theirs: list[Row]) -> None:
    print(f"{'task':34s} {'n':>6s} {'s':>8s} {'CPU s':>8s} {'ex/s':>8s}   nanochat: s, CPU s, times as long, equal")
    for row, other in zip(ours, theirs or [None] * len(ours), strict=True):
        line = f"{row['task']:34s} {row['n']:6d} {row['seconds']:8.2f} {row['cpu_seconds']:8.2f}"
        line += f" {row['n'] / max(row['seconds'], 1e-9):8.1f}"
        if other is not None:
            equal = sum(a == b for a, b in zip(row["right"], other["right"], strict=True))
            ratio = other["seconds"] / max(row["seconds"], 1e-9)
            line += f"   {other['seconds']:.2f} {other['cpu_seconds']:.2f} {ratio:.1f} {equal} of {row['n']}"
        print(line)


def set_precision(options: argparse.Namespace, model: Any, device: torch.device) -> AbstractContextManager[Any]:
    """Put the model on the device, and what it runs under."""
    precision = options.precision or ("autocast" if device.type == "cuda" else "fp32")
    options.precision = precision
    model.to(device).eval()
    if precision == "bf16":
        model.to(torch.bfloat16)
    return torch.autocast(device.type, torch.bfloat16) if precision == "autocast" else nullcontext()


def main() -> None:
    logging.getLogger("chatmodel").setLevel(logging.WARNING)
    options = parse_options()
    device = choose_device()
    model, tokenizer = load_any(options)
    tasks = list(load_core_tasks(find_bundle(options.eval_bundle), max_per_task=options.max_per_task))
    settings = CoreSettings(options.batch_tokens or BATCH_TOKENS[device.type], share_prefixes=not options.unshared)
    with set_precision(options, model, device), torch.no_grad():
        began = time.perf_counter()
        ours = measure_ours(model, tokenizer, tasks, settings)
        wall = time.perf_counter() - began
        theirs = list(measure_nanochat(options.nanochat, model, tokenizer, tasks)) if options.nanochat else []
    show_rows(ours, theirs)
    result: Row = {
        "parameters": model.num_parameters(),
        "precision": options.precision,
        "batch_tokens": settings.batch_tokens,
        "shared": settings.share_prefixes,
        "max_per_task": options.max_per_task,
        "wall_seconds": wall,
        "ours": add_up(ours),
        "hardware": describe_environment()["hardware"],
        "software": describe_environment()["software"],
    }
    if device.type == "cuda":
        result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    if theirs:
        pairs = [
            pair
            for ours_row, row in zip(ours, theirs, strict=True)
            for pair in zip(ours_row["right"], row["right"], strict=True)
        ]
        result["nanochat"] = add_up(theirs)
        result["ratio"] = {key: result["nanochat"][key] / result["ours"][key] for key in ("seconds", "cpu_seconds")}
        result["equal_decisions"] = [sum(a == b for a, b in pairs), len(pairs)]
    print(json.dumps(result))


if __name__ == "__main__":
    entry_point(main)

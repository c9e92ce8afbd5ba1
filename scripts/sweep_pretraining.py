"""Compare variants of pretraining at equal tokens: document bits per byte, seconds, memory.

    python scripts/sweep_pretraining.py --run_dir RUN --depth 6 --train_tokens 100000000 \\
        plain: half:batch=131072 faster:batch=65536,lr=1.5 cropped:packing=best_fit

RUN holds a tokenizer and a token store (`recipes/train_tokenizer.py`, `scripts/prepare_data.py`). Variants run one
after the other in this process, without checkpoints; each is `name:key=value,...` with these keys:

    batch tokens depth seed packing           instead of the plan's (tokens: of training)
    documents_apart                           true: attend within documents
    lr, lr_GROUP                              factors on the planned rates (groups: matrix, embedding, head, ...)
    decay, decay_GROUP                        factors on the planned weight decay
    warmdown final_lr                         shares of the steps, and of the rate
    anything else                             a setting of the model (smear=true, sliding_window=256, window_pattern=L)
"""

import argparse
import gc
import json
import logging
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from huggingface_hub.errors import StrictDataclassError

from chatmodel.arguments import write_plainly
from chatmodel.data.rows import PACKINGS, PackedRows
from chatmodel.data.store import TokenStore, check_tokenizer
from chatmodel.devices import choose_precision
from chatmodel.evaluation.bits_per_byte import document_bits_per_byte
from chatmodel.model import GPTConfig, GPTForCausalLM
from chatmodel.runtime import UserError, entry_point
from chatmodel.scaling import GroupPlan, RunPlan, plan_run
from chatmodel.tokenizer import load_tokenizer, token_byte_lengths
from chatmodel.train_step import StepResult, TrainStep
from chatmodel.training.loading import Loader

WHOLE_KEYS = ("batch", "tokens", "depth", "seed")
NUMBER_KEYS = ("lr", "decay", "warmdown", "final_lr")
OWN_KEYS = (*WHOLE_KEYS, *NUMBER_KEYS, "packing", "documents_apart")
FACTORS = ("lr_", "decay_")  # of one group
Variant = dict[str, Any]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="+", help="name:key=value,...")
    parser.add_argument("--run_dir", type=Path, required=True, help="holds tokenizer/ and data/")
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--train_tokens", type=int, default=100_000_000)
    parser.add_argument("--sequence_length", type=int, default=2048)
    parser.add_argument("--head_dim", type=int, default=128)
    parser.add_argument("--device_batch_size", type=int, default=32)
    parser.add_argument("--max_documents", type=int, help="of validation; all if left out")
    parser.add_argument("--mixed_precision", choices=("bf16", "no"), help="by default what is faster here")
    parser.add_argument("--json", type=Path, help="append one line a variant to this file")
    return parser.parse_args()


def read_variant(text: str) -> tuple[str, Variant]:
    """A name and its changes; values are read as YAML reads them."""
    name, colon, rest = text.partition(":")
    pairs = [pair.partition("=") for pair in rest.split(",") if pair]
    if not colon or not all(key and value for key, _, value in pairs):
        raise UserError(f"variant {text!r} is not of the form name:key=value,key=value")
    return name, {key: read_value(key, value) for key, _, value in pairs}


def read_value(key: str, text: str) -> Any:
    is_whole = key in WHOLE_KEYS
    if not is_whole and key not in NUMBER_KEYS and not key.startswith(FACTORS):
        return yaml.safe_load(text)
    try:
        return int(write_plainly(text)) if is_whole else float(text)
    except ValueError:
        raise UserError(f"{key}={text} must be a {'whole ' if is_whole else ''}number") from None


def build_plan(args: argparse.Namespace, variant: Variant, vocab_size: int) -> RunPlan:
    """The plan of a variant: the dial's, changed where the variant says so."""
    plan = plan_run(
        variant.get("depth", args.depth),
        vocab_size=vocab_size,
        sequence_length=args.sequence_length,
        head_dim=args.head_dim,
        train_tokens=int(variant.get("tokens", args.train_tokens)),
        total_batch_tokens=variant.get("batch"),
        window_pattern=variant.get("window_pattern"),
    )
    factors = {key: value for key, value in variant.items() if key.startswith(FACTORS)}
    unknown = [key for key in factors if key.partition("_")[2] not in plan.groups]
    if unknown:
        raise UserError(f"{unknown[0]} names no group; there are {', '.join(plan.groups)}")
    settings = {key: value for key, value in variant.items() if key not in (*OWN_KEYS, *factors)}
    foreign = [key for key in settings if not hasattr(GPTConfig(), key)]
    if foreign:
        raise UserError(f"{foreign[0]} is no key of a variant and no setting of the model; see --help")
    check_settings(plan.model | settings)
    if variant.get("packing", PACKINGS[0]) not in PACKINGS:
        raise UserError(f"packing={variant['packing']} is unknown; choose one of {', '.join(PACKINGS)}")
    schedule = replace(
        plan.schedule,
        warmdown_steps=round(variant.get("warmdown", plan.schedule.warmdown_steps / plan.steps) * plan.steps),
        final_lr_fraction=variant.get("final_lr", plan.schedule.final_lr_fraction),
    )
    groups = {name: scale_group(name, group, variant) for name, group in plan.groups.items()}
    return replace(plan, groups=groups, schedule=schedule, model=plan.model | settings)


def check_settings(settings: dict[str, Any]) -> None:
    """Refuse what is no model's configuration, in one sentence."""
    try:
        GPTConfig(**settings)
    except (TypeError, ValueError, StrictDataclassError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise UserError(f"a variant asks for a model that cannot be: {reason}") from None


def scale_group(name: str, group: GroupPlan, variant: Variant) -> GroupPlan:
    lr = group.lr * variant.get("lr", 1.0) * variant.get(f"lr_{name}", 1.0)
    decay = group.weight_decay * variant.get("decay", 1.0) * variant.get(f"decay_{name}", 1.0)
    return replace(group, lr=lr, weight_decay=decay)


def run_variant(
    args: argparse.Namespace, plan: RunPlan, variant: Variant, tokenizer: Any, accelerator: Accelerator
) -> dict[str, Any]:
    """Train from nothing and measure; seconds are those of the steps, less the first three, which compile."""
    seed = variant.get("seed", 42)
    torch.manual_seed(seed)
    model = GPTForCausalLM(plan.model_config(bos_token_id=tokenizer.bos_token_id))
    apart = variant.get("documents_apart", False)
    size = plan.fit_rows(args.device_batch_size, accelerator.num_processes)
    step = TrainStep(model, plan, accelerator, device_batch_size=size, documents_apart=apart)
    store = TokenStore.open(args.run_dir / "data" / "train")
    packing = variant.get("packing", "best_fit_whole")
    length = plan.sequence_length
    rows = PackedRows(store, sequence_length=length, packing=packing, seed=seed, documents_apart=apart)
    losses: list[float] = []
    untimed = min(3, plan.steps - 1)
    began = time.perf_counter()
    with Loader(rows, batch_size=size, device=accelerator.device, timeout=60) as loader:
        for index, result in enumerate(take_steps(step, loader, plan.steps)):
            if not result.updated:
                return {"failed": f"loss {result.loss}, gradient {result.gradient_norm} at step {index}"}
            losses.append(result.loss)
            if index + 1 == untimed:
                began = time.perf_counter()
        seconds = (time.perf_counter() - began) * plan.steps / (plan.steps - untimed)
    with step.evaluating() as evaluated:
        bpb = document_bits_per_byte(
            evaluated,
            validation_documents(args),
            token_byte_lengths(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            max_tokens=plan.sequence_length,
        )
    last = losses[-max(1, plan.steps // 20) :]
    return {
        "document_bpb": bpb,
        "train_loss": sum(last) / len(last),
        "seconds": seconds,
        "tokens_per_second": plan.train_tokens / seconds,
        "steps": plan.steps,
        "total_batch_tokens": plan.total_batch_tokens,
        "passes": rows.epoch + 1,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
    }


def take_steps(step: TrainStep, loader: Loader, steps: int) -> Iterator[StepResult]:
    """What each step found; as in pretraining, it is looked at behind the next one's micro-batches."""
    underway = None
    for index in range(steps):
        for _ in range(step.accumulation):
            step.accumulate(loader.take())
        if underway is not None:
            yield underway.wait()
        underway = step.begin_update(index)
    if underway is not None:
        yield underway.wait()


def validation_documents(args: argparse.Namespace) -> Iterator[list[int]]:
    store = TokenStore.open(args.run_dir / "data" / "validation")
    spans = list(pairwise(store.offsets.tolist()))[: args.max_documents]
    return (store.tokens[start:end].tolist() for start, end in spans)


def main() -> None:
    args = parse()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    tokenizer = load_tokenizer(args.run_dir / "tokenizer")
    for split in ("train", "validation"):
        check_tokenizer(TokenStore.open(args.run_dir / "data" / split), tokenizer)
    variants = [read_variant(text) for text in args.variants]
    plans = [build_plan(args, variant, len(tokenizer)) for _, variant in variants]  # all are refused before any runs
    cpu = not torch.cuda.is_available()
    precision = choose_precision(torch.device("cpu" if cpu else "cuda"), args.mixed_precision)
    accelerator = Accelerator(mixed_precision=precision, cpu=cpu)
    for (name, variant), plan in zip(variants, plans, strict=True):
        line = {"name": name, **variant, **run_variant(args, plan, variant, tokenizer, accelerator)}
        print(json.dumps(line), flush=True)
        if args.json:
            with args.json.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        # Nothing of a variant is left to the next: memory, its peak, compiled code.
        gc.collect()
        torch._dynamo.reset()
        if not cpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    entry_point(main)

"""Training speed on this device, optimizer included: `python scripts/bench_train.py --depths 8 12`.

Each system runs in a process of its own, one after the other, `--repeats` times in turn: median seconds of a step
(after `--warmup` steps, synchronised), random tokens, peak memory, and the device's ceilings before and after. With
`--nanochat CHECKOUT` (a clone of karpathy/nanochat, of October 2025 or of 2026) its model and optimizer run beside
ours at the same sizes. Several devices: `torchrun --nproc_per_node N scripts/bench_train.py --single ours ...`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from chatmodel.devices import choose_precision
from chatmodel.model import GPTForCausalLM
from chatmodel.runtime import UserError, entry_point
from chatmodel.scaling import RunPlan, plan_run
from chatmodel.train_step import TrainStep

Batch = tuple[torch.Tensor, torch.Tensor]  # inputs and the tokens that follow them, both (B, T)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[12])
    parser.add_argument("--recipe", default="chatmodel", help="of our model: chatmodel, seed or compat")
    parser.add_argument("--vocab_size", type=int, default=32_768)
    parser.add_argument("--sequence_length", type=int, default=2048)
    parser.add_argument("--head_dim", type=int, default=128)
    parser.add_argument("--window_pattern", help="of our model, by default the recipe's")
    parser.add_argument("--device_batch_size", type=int, default=32)
    parser.add_argument("--total_batch_tokens", type=int, default=2**19)
    parser.add_argument("--steps", type=int, default=40, help="measured steps")
    parser.add_argument("--warmup", type=int, default=15, help="steps before them")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--mixed_precision", choices=("bf16", "no"), help="by default what is faster here")
    parser.add_argument("--fp8", action="store_true", help="also measure our model with fp8 linear layers")
    parser.add_argument("--no_cuda_graphs", action="store_true", help="launch our kernels one by one")
    parser.add_argument(
        "--document_tokens", type=int, help="also measure ours with documents of this mean length kept apart"
    )
    parser.add_argument("--nanochat", type=Path, help="a checkout of nanochat to run beside ours")
    parser.add_argument(
        "--nanochat_window", default="L", help="its window pattern; it has no fast windows without FA3"
    )
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--profile", type=Path, help="write a table of where one step of ours spends its time")
    parser.add_argument("--single", help=argparse.SUPPRESS)  # one system, in this process
    return parser.parse_args()


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot be measured before anything is: here the rows asked for are the rows of a micro-batch."""
    for depth in args.depths:
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        plan(args, depth).accumulation_steps(args.device_batch_size, world_size)
    if args.nanochat is not None and not (args.nanochat / "nanochat" / "gpt.py").is_file():
        raise UserError(
            f"{args.nanochat} is no checkout of nanochat (it has no nanochat/gpt.py); clone it there first"
        )


def plan(args: argparse.Namespace, depth: int) -> RunPlan:
    return plan_run(
        depth,
        vocab_size=args.vocab_size,
        sequence_length=args.sequence_length,
        recipe=args.recipe,
        head_dim=args.head_dim,
        total_batch_tokens=args.total_batch_tokens,
        max_steps=1000,
        window_pattern=args.window_pattern,
    )


def build_ours(
    args: argparse.Namespace, *, fp8: bool, apart: bool
) -> tuple[Callable[[list[Batch]], None], dict[str, Any]]:
    cpu = not torch.cuda.is_available()
    precision = choose_precision(torch.device("cpu" if cpu else "cuda"), args.mixed_precision)
    accelerator = Accelerator(mixed_precision=precision, cpu=cpu)
    run = plan(args, args.depths[0])
    model = GPTForCausalLM(run.model_config())
    step = TrainStep(
        model,
        run,
        accelerator,
        device_batch_size=args.device_batch_size,
        fp8=fp8,
        cuda_graphs=False if args.no_cuda_graphs else None,
        documents_apart=apart,
    )
    count = iter(range(10**9))
    documents = {"document_starts": draw_document_starts(args).to(accelerator.device)} if apart else {}

    def take(batches: list[Batch]) -> None:
        for inputs, targets in batches:
            step.accumulate({"input_ids": inputs, "shift_labels": targets, **documents})
        step.finish(next(count))

    facts = {"flops_per_token": run.flops_per_token, "parameters": run.parameters, "precision": precision}
    return take, facts


def draw_document_starts(args: argparse.Namespace) -> torch.Tensor:
    """Where documents start in a micro-batch: at every row, and at random within, for the asked mean length."""
    tokens = args.device_batch_size * args.sequence_length
    generator = torch.Generator().manual_seed(0)
    within = torch.randint(
        1, tokens, (max(0, tokens // args.document_tokens - args.device_batch_size),), generator=generator
    )
    rows = torch.arange(0, tokens, args.sequence_length)
    starts = torch.cat((rows, within)).unique()
    room = torch.full((len(rows) + len(within) - len(starts) + 1,), tokens)
    return torch.cat((starts, room)).int()


def build_nanochat(args: argparse.Namespace) -> tuple[Callable[[list[Batch]], None], dict[str, Any]]:
    """nanochat's own model and optimizer, driven as its training script drives them."""
    sys.path.insert(0, str(args.nanochat))
    from nanochat.gpt import GPT, GPTConfig

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    depth = args.depths[0]
    is_master = "window_pattern" in GPTConfig.__dataclass_fields__
    heads = -(-64 * depth // args.head_dim)
    width = heads * args.head_dim if is_master else 64 * depth
    sizes = {"sequence_len": args.sequence_length, "vocab_size": args.vocab_size, "n_layer": depth, "n_embd": width}
    options = {"window_pattern": args.nanochat_window} if is_master else {}
    with torch.device("meta"):
        model = GPT(GPTConfig(n_head=heads, n_kv_head=heads, **sizes, **options))
    model.to_empty(device=device)
    torch.set_float32_matmul_precision("high")
    model.init_weights()
    optimizers = [model.setup_optimizer()] if is_master else model.setup_optimizers()
    compiled = torch.compile(model, dynamic=False) if device.type == "cuda" else model
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" and not is_master)

    def take(batches: list[Batch]) -> None:
        for inputs, targets in batches:
            with autocast:
                loss = compiled(inputs, targets)
            (loss / len(batches)).backward()
        if not is_master:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        loss.item()

    facts = {
        "flops_per_token": float(model.estimate_flops()),
        "parameters": sum(p.numel() for p in model.parameters()),
        "precision": "bf16",
    }
    return take, facts


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Median seconds a step of the system `args.single`, and what it needed."""
    began = time.perf_counter()
    take, facts = (
        build_nanochat(args)
        if args.single == "nanochat"
        else build_ours(args, fp8="fp8" in args.single, apart="apart" in args.single)
    )
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    world_size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    micro_batches = args.total_batch_tokens // (args.device_batch_size * args.sequence_length * world_size)
    generator = torch.Generator().manual_seed(rank)
    size = (args.device_batch_size, args.sequence_length + 1)
    tokens = [torch.randint(args.vocab_size, size, generator=generator).to(device) for _ in range(micro_batches)]
    batches = [(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()) for ids in tokens]
    seconds = []
    for index in range(args.warmup + args.steps):
        synchronize()
        start = time.perf_counter()
        take(batches)
        synchronize()
        seconds.append(time.perf_counter() - start)
        if index == 0:
            facts["seconds_to_first_step"] = time.perf_counter() - began
    if args.profile is not None and args.single.startswith("ours") and rank == 0:
        write_profile(args.profile, take, batches)
    step = statistics.median(seconds[args.warmup :])
    memory = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    reserved = torch.cuda.max_memory_reserved() / 2**30 if torch.cuda.is_available() else None
    return facts | {
        "system": args.single,
        "depth": args.depths[0],
        "world_size": world_size,
        "step_seconds": step,
        "tokens_per_second": args.total_batch_tokens / step,
        "peak_gib": memory,
        "reserved_gib": reserved,  # with what CUDA graphs keep
    }


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def write_profile(path: Path, take: Callable[[list[Batch]], None], batches: list[Batch]) -> None:
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities) as profiler:
        take(batches)
        synchronize()
    key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(profiler.key_averages().table(sort_by=key, row_limit=70, max_name_column_width=110))


def measure_ceilings() -> dict[str, float]:
    """bf16 matrix product of 8192^3 in TFLOP/s and copying in TB/s (bytes read and written) of a CUDA device."""
    if not torch.cuda.is_available():
        return {}
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(2**30, device="cuda")
    target = torch.empty_like(source)
    rates = {}
    for name, work, amount in (
        ("matmul_tflops", lambda: left @ right, 2 * 8192**3 / 1e12),
        ("copy_tb_per_second", lambda: target.copy_(source), 2 * source.nbytes / 1e12),
    ):
        times = []
        for _ in range(13):
            synchronize()
            began = time.perf_counter()
            work()
            synchronize()
            times.append(time.perf_counter() - began)
        rates[name] = amount / statistics.median(times[3:])
    return rates


def run_child(arguments: list[str], system: str, depth: int) -> dict[str, Any]:
    """A system in a process of its own."""
    command = [sys.executable, __file__, *arguments, "--single", system, "--depths", str(depth)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{system} at depth {depth} failed with exit code {done.returncode}; its messages are above")
    return json.loads(done.stdout.strip().splitlines()[-1])


def render(results: list[dict[str, Any]]) -> str:
    """A Markdown table: medians over the repeats, and ratios to nanochat where it ran."""
    lines = [
        "| depth | system | tok/s | ratio | MFU of 989 TF/s | peak GiB | first step, s |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for depth in sorted({r["depth"] for r in results}):
        systems = list(dict.fromkeys(r["system"] for r in results if r["depth"] == depth))
        speeds = {
            s: statistics.median(r["tokens_per_second"] for r in results if (r["system"], r["depth"]) == (s, depth))
            for s in systems
        }
        for system in systems:
            one = next(r for r in results if (r["system"], r["depth"]) == (system, depth))
            ratio = f"{speeds[system] / speeds['nanochat']:.3f}" if "nanochat" in speeds else ""
            share = f"{100 * speeds[system] * one['flops_per_token'] / 989e12:.1f} %" if one["peak_gib"] else ""
            memory = f"{one['peak_gib']:.1f}" if one["peak_gib"] else ""
            lines.append(
                f"| {depth} | {system} | {speeds[system]:,.0f} | {ratio} | {share} | {memory} "
                f"| {one['seconds_to_first_step']:.0f} |"
            )
    return "\n".join(lines)


def main() -> None:
    args = parse()
    check(args)
    if args.single:
        result = measure(args)
        if int(os.environ.get("RANK", "0")) == 0:
            print(json.dumps(result))
        return
    before = measure_ceilings()
    torch.cuda.empty_cache()
    asked = {"ours": True, "ours_apart": args.document_tokens, "ours_fp8": args.fp8, "nanochat": args.nanochat}
    systems = [system for system, wanted in asked.items() if wanted]
    results: list[dict[str, Any]] = []
    for depth, _, system in product(args.depths, range(args.repeats), systems):
        results.append(run_child(sys.argv[1:], system, depth))
        print(f"{system}, depth {depth}: {results[-1]['tokens_per_second']:,.0f} tok/s", file=sys.stderr)
        keep(args, results, {"before": before})  # what was measured is there even if the rest is cut off
    ceilings = {"before": before, "after": measure_ceilings()}
    print(render(results))
    print(json.dumps(ceilings))
    keep(args, results, ceilings)


def keep(args: argparse.Namespace, results: list[dict[str, Any]], ceilings: dict[str, Any]) -> None:
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"results": results, "ceilings": ceilings}, indent=2) + "\n")


if __name__ == "__main__":
    entry_point(main)

"""How fast replies come on this device: `python scripts/bench_infer.py --depths 8 12 20`, or `--model FOLDER`.

Prompts of `--prompt_tokens` are read (`--prefill_batch` different ones at once), then one prompt is answered by each
of `--batch_sizes` rows with `--new_tokens` tokens, greedy, after a round that does not count. The limit is what the
memory would allow: every matrix once a step, and each row's keys and values as far as its layers see them, at the
speed of a copy. With `--nanochat CHECKOUT` (a clone of karpathy/nanochat) its engine runs beside ours, as its own
`scripts/infer_bench.py` measures: median time of a step. `--parity` compares our tokens with plain `generate`.
`--json FILE` keeps every figure.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from chatmodel.checkpoint import load_model
from chatmodel.decoding.engine import Decoder, Request
from chatmodel.decoding.pool import Engine
from chatmodel.decoding.prompts import read_prompts
from chatmodel.decoding.sampling import Sampling
from chatmodel.devices import choose_device, measure_copy, time_call, time_fastest
from chatmodel.model import GPTForCausalLM
from chatmodel.runtime import UserError, entry_point
from chatmodel.scaling import plan_run

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[8], help="fresh models of these depths")
    parser.add_argument("--model", type=Path, help="a model folder instead")
    parser.add_argument("--vocab_size", type=int, default=32_768)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--prompt_tokens", type=int, default=1792)
    parser.add_argument("--new_tokens", type=int, default=256)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--prefill_batch", type=int, default=16)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top_k", type=int)
    parser.add_argument("--dtype", choices=DTYPES, help="by default bf16 on a GPU, fp32 elsewhere")
    parser.add_argument("--threads", type=int, help="of a CPU, by default all")
    parser.add_argument("--nanochat", type=Path, help="a checkout of nanochat to run beside ours")
    parser.add_argument("--nanochat_tokens", type=int, default=48, help="new tokens there, where each takes the same")
    parser.add_argument("--parity", action="store_true", help="compare tokens with plain generate, and nothing else")
    parser.add_argument("--parity_prompts", type=int, default=50)
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--single", help=argparse.SUPPRESS)  # one system, in this process: ours, nanochat
    return parser.parse_args()


def pick_dtype(args: argparse.Namespace, device: torch.device) -> torch.dtype:
    return DTYPES[args.dtype or ("bf16" if device.type == "cuda" else "fp32")]


def build_model(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> GPTForCausalLM:
    if args.model is not None:
        return load_model(args.model, dtype=dtype).to(device).eval()
    sizes = {"vocab_size": args.vocab_size, "sequence_length": args.context}
    config = plan_run(args.depths[0], **sizes).model_config()
    torch.manual_seed(0)
    with torch.device(device):
        model = GPTForCausalLM(config)
        for name, parameter in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:  # zero in a fresh model, which would say nothing of tokens
                torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
            elif "lm_head" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return model.to(dtype).eval()


def make_prompts(count: int, length: int, vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(vocab_size, (count, length), generator=generator).tolist()


def time_reply(
    decoder: Decoder, prompt: list[int], rows: int, new_tokens: int, sampling: Sampling
) -> tuple[float, float]:
    """Seconds to the first tokens, and seconds from them to the last."""
    requests = [Request(prompt, new_tokens, seed) for seed in range(rows)]
    began, first = time.perf_counter(), 0.0
    for _ in decoder.decode(requests, sampling):
        first = first or time.perf_counter()
    return first - began, time.perf_counter() - first


def measure_ours(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    dtype = pick_dtype(args, device)
    model = build_model(args, device, dtype)
    began = time.perf_counter()
    engine = Engine(model, dtype)
    weights = engine.weights
    sampling = Sampling(args.temperature, args.top_k)
    prompt = make_prompts(1, args.prompt_tokens, weights.vocab_size)[0]
    facts = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(dtype).removeprefix("torch."),
        "copy_bytes_per_second": measure_copy(device),
        "prefill": measure_prefill(args, engine),
        "batches": [],
    }
    for rows in args.batch_sizes:
        clear_memory(device)
        decoder = engine.make_decoder(rows, len(prompt) + args.new_tokens, ())
        time_reply(decoder, prompt, rows, 9, sampling)
        prepared = time.perf_counter() - began
        to_first, rest = time_reply(decoder, prompt, rows, args.new_tokens, sampling)
        steps = args.new_tokens - 1
        limit = weights.bytes_read(args.prompt_tokens + args.new_tokens // 2, rows) / facts["copy_bytes_per_second"]
        facts["batches"].append(
            {
                "rows": rows,
                "seconds_to_first_token": to_first,
                "seconds_per_step": rest / steps,
                "tokens_per_second": rows * steps / rest,
                "share_of_limit": limit / (rest / steps),
                "peak_gib": peak_gib(device),
                "prepared_after": prepared,
            }
        )
        del decoder
    return facts


@torch.no_grad()
def measure_prefill(args: argparse.Namespace, engine: Engine) -> dict[str, Any]:
    weights = engine.weights
    decoder = engine.make_decoder(args.prefill_batch, args.prompt_tokens, ())
    ids = torch.tensor(make_prompts(args.prefill_batch, args.prompt_tokens, weights.vocab_size), device=weights.device)
    lengths = torch.full((len(ids),), ids.shape[1], device=weights.device)
    rows = torch.arange(len(ids), device=weights.device)

    def keep(index: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        decoder.state.keep_prompt(index, keys, values, lengths, rows)

    def work() -> None:
        read_prompts(weights, ids, lengths, keep=keep, operations=decoder.steps.operations, banned=None)

    seconds = time_fastest(work, weights.device, repeats=3)
    return {"rows": len(ids), "seconds": seconds, "tokens_per_second": ids.numel() / seconds}


def clear_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> float | None:
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None


def build_nanochat(args: argparse.Namespace, device: torch.device) -> tuple[Any, Any]:
    """nanochat's model and engine, and the context its engine runs in."""
    sys.path.insert(0, str(args.nanochat))
    # Its loader of checkpoints is not used here, and needs more packages.
    sys.modules["nanochat.checkpoint_manager"] = SimpleNamespace(load_model=None)
    from nanochat.engine import Engine as NanochatEngine
    from nanochat.gpt import GPT, GPTConfig

    is_master = "window_pattern" in GPTConfig.__dataclass_fields__
    depth = args.depths[0]
    heads = -(-64 * depth // 128)
    sizes = {"sequence_len": args.context, "vocab_size": args.vocab_size, "n_layer": depth}
    with torch.device("meta"):
        model = GPT(GPTConfig(n_head=heads, n_kv_head=heads, n_embd=128 * heads if is_master else 64 * depth, **sizes))
    model.to_empty(device=device)
    model.init_weights()
    # Its marks never come, so that every row gets all its tokens.
    tokenizer = SimpleNamespace(encode_special=lambda mark: -1, get_bos_token_id=lambda: -1)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" and not is_master)
    return NanochatEngine(model.eval(), tokenizer), autocast


def measure_nanochat(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    engine, context = build_nanochat(args, device)
    prompt = make_prompts(1, args.prompt_tokens, args.vocab_size)[0]
    parameters = sum(p.numel() for p in engine.model.parameters())
    facts = {"parameters": parameters, "dtype": "its own", "batches": []}
    for rows in args.batch_sizes:
        clear_memory(device)
        for _ in time_nanochat(engine, context, device, prompt, rows, 4, args.temperature):
            pass
        seconds = list(time_nanochat(engine, context, device, prompt, rows, args.nanochat_tokens, args.temperature))
        step = statistics.median(seconds[1:])
        facts["batches"].append(
            {
                "rows": rows,
                "seconds_to_first_token": seconds[0],
                "seconds_per_step": step,
                "tokens_per_second": rows / step,
                "peak_gib": peak_gib(device),
            }
        )
    return facts


def time_nanochat(
    engine: Any, context: Any, device: torch.device, prompt: list[int], rows: int, tokens: int, temperature: float
) -> Iterator[float]:
    """Seconds of each step, reading the prompt first."""
    with (
        context,
        contextlib.closing(
            engine.generate(prompt, num_samples=rows, max_tokens=tokens, temperature=temperature)
        ) as stream,
    ):
        for _ in range(tokens):
            yield time_call(lambda: next(stream), device)


@torch.no_grad()
def measure_parity(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Where our greedy tokens leave those of plain `generate`, and by how little each was ahead there.

    The margin is between the two tokens' logits in fp32: two computations in bf16 differ by some hundredths.
    """
    dtype = pick_dtype(args, device)
    model = build_model(args, device, torch.float32)
    truth = build_model(args, device, torch.float32)
    model.to(dtype)
    engine = Engine(model, dtype)
    context = model.config.max_position_embeddings
    longest = min(args.prompt_tokens, context - args.new_tokens)
    lengths = torch.linspace(1, longest, args.parity_prompts).long().tolist()
    prompts = [make_prompts(1, length, model.config.vocab_size)[0] for length in lengths]
    requests = [Request(prompt, args.new_tokens) for prompt in prompts]
    ours: list[list[int]] = [[] for _ in prompts]
    for progress in engine.decode(requests, Sampling(), end_ids=(), rows=max(args.batch_sizes)):
        ours[progress.index] += progress.ids
    divergences = []
    for prompt, reply in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt], device=device)
        options = {"max_new_tokens": args.new_tokens, "do_sample": False, "eos_token_id": [], "pad_token_id": 0}
        plain = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()
        at = next((i for i, pair in enumerate(zip(plain, reply, strict=True)) if pair[0] != pair[1]), None)
        if at is not None:
            logits = truth(torch.tensor([prompt + plain[:at]], device=device), logits_to_keep=1).logits[0, -1]
            margin = float(logits[plain[at]] - logits[reply[at]])
            divergences.append({"prompt_tokens": len(prompt), "at": at, "margin": margin})
    return {
        "dtype": str(dtype),
        "prompts": len(prompts),
        "equal": len(prompts) - len(divergences),
        "divergences": divergences,
    }


def run_child(arguments: list[str], system: str, depth: int) -> dict[str, Any] | None:
    """A system in a process of its own; None if it failed, with its messages on stderr."""
    command = [sys.executable, __file__, *arguments, "--single", system, "--depths", str(depth)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        print(f"{system} at depth {depth} failed with exit code {done.returncode}", file=sys.stderr)
        return None
    return json.loads(done.stdout.strip().splitlines()[-1]) | {"system": system, "depth": depth}


def render(results: list[dict[str, Any]]) -> str:
    """A Markdown table."""
    lines = [
        "| depth | system | rows | first token, ms | a step, ms | tok/s | of the limit | peak GiB |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for result in results:
        for batch in result["batches"]:
            share = f"{100 * batch['share_of_limit']:.0f} %" if "share_of_limit" in batch else ""
            memory = f"{batch['peak_gib']:.2f}" if batch["peak_gib"] else ""
            lines.append(
                f"| {result['depth']} | {result['system']} | {batch['rows']} "
                f"| {1e3 * batch['seconds_to_first_token']:.1f} | {1e3 * batch['seconds_per_step']:.3f} "
                f"| {batch['tokens_per_second']:,.0f} | {share} | {memory} |"
            )
        if "prefill" in result:
            read = result["prefill"]
            lines.append(
                f"| {result['depth']} | {result['system']}, reading prompts | {read['rows']} "
                f"| {1e3 * read['seconds']:.1f} | | {read['tokens_per_second']:,.0f} | | |"
            )
    return "\n".join(lines)


def render_parity(result: dict[str, Any]) -> str:
    """A sentence, and a line for each prompt where the tokens part."""
    same = f"{result['equal']} of {result['prompts']} prompts: the tokens of plain generate ({result['dtype']})"
    parted = [
        f"prompt of {found['prompt_tokens']} tokens: another token at {found['at']}, behind by {found['margin']:.4f}"
        for found in result["divergences"]
    ]
    return "\n".join([same, *parted])


def main() -> None:
    args = parse()
    if args.prompt_tokens + args.new_tokens > args.context:
        raise UserError(
            f"prompt_tokens={args.prompt_tokens} and new_tokens={args.new_tokens} do not fit context={args.context}"
        )
    if args.threads:
        torch.set_num_threads(args.threads)
    device = choose_device()
    if args.parity:
        results = [measure_parity(args, device)]
        print(render_parity(results[0]))
    elif args.single:
        print(json.dumps(measure_nanochat(args, device) if args.single == "nanochat" else measure_ours(args, device)))
        return
    else:
        systems = ["ours", *(["nanochat"] if args.nanochat else [])]
        found = [run_child(sys.argv[1:], system, depth) for system in systems for depth in args.depths]
        results = sorted((result for result in found if result is not None), key=lambda result: result["depth"])
        print(render(results))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=2) + "\n")
    if not args.parity and len(results) < len(found):
        sys.exit(1)


if __name__ == "__main__":
    entry_point(main)

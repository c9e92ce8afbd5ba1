"""How fast a step of reinforcement learning is here, and where its time goes: `python scripts/bench_rl.py`.

A fresh model of `--depth` answers word problems with random tokens, so nearly every completion has its full length,
and random rewards leave every group something to learn. First the completions alone, by `--rows` at once, as the
recipe samples them (temperature 1, `--top_k`, calculator on), the weights changed between rounds; then `--steps` steps
of the recipe itself, with the device waited for between the parts.
"""

import argparse
import itertools
import json
import random
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
from grpo import RewardArguments, RewardConfig, build_trainer

from chatmodel.checkpoint import save_model_folder
from chatmodel.conversations.render import render_prompt
from chatmodel.decoding.pool import find_engine
from chatmodel.devices import choose_device, peak_memory_bytes
from chatmodel.model import GPTForCausalLM
from chatmodel.posttraining import load_stage_model
from chatmodel.problems import build_problems, open_problems
from chatmodel.rollouts import Sampler
from chatmodel.runs import Run
from chatmodel.runtime import entry_point, write_json
from chatmodel.scaling import plan_run
from chatmodel.tokenizer import calculator_table, train_tokenizer


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--vocab_size", type=int, default=32_768)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--rows", type=int, nargs="+", default=[128, 512], help="completions at once")
    parser.add_argument("--long_prompt", type=int, default=1792, help="tokens of a prompt that is measured as well")
    parser.add_argument("--new_tokens", type=int, default=256)
    parser.add_argument("--top_k", type=int, nargs="+", default=[50, 0], help="0 draws from all tokens")
    parser.add_argument("--generations", type=int, default=16)
    parser.add_argument("--device_batch_size", type=int, default=64)
    parser.add_argument("--accumulation", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10, help="measured, after two that are not")
    parser.add_argument("--json", type=Path, help="write all figures here")
    return parser.parse_args()


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def make_stage(args: argparse.Namespace, run: Run) -> None:
    """A model folder like SFT's, of random numbers."""
    tokenizer = train_tokenizer([*topics.values()], 512, max_chars=200_000, doc_cap=10_000)
    plan = plan_run(args.depth, vocab_size=args.vocab_size, sequence_length=args.context)
    torch.manual_seed(0)
    model = GPTForCausalLM(plan.model_config())
    model.config.calculator = calculator_table(tokenizer)
    for name, parameter in model.named_parameters():
        if "o_proj" in name or "down_proj" in name:  # zero in a fresh model
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    save_model_folder(model, tokenizer, run.folder("sft"), card=["A model of random numbers."])
    write_json(run.folder("sft") / "plan.json", plan.as_dict())


def measure_sampling(
    args: argparse.Namespace, model: Any, tokenizer: Any, prompt: list[int], *, rows: int, top_k: int
) -> Any:
    limits = {"max_new_tokens": min(args.new_tokens, args.context - len(prompt)), "longest_prompt": len(prompt)}
    sampler = Sampler(model, tokenizer, temperature=1.0, top_k=top_k or None, rows=rows, seed=0, **limits)
    device = model.device
    rounds = []
    for number in range(4):
        wait(device)
        began, before = time.perf_counter(), sampler.tokens
        sampler.sample([prompt] * rows, str(number))
        wait(device)
        rounds.append((sampler.tokens - before) / (time.perf_counter() - began))
        decoder = sampler._decoder
        graphs = {key: id(graph) for key, (graph, _) in getattr(decoder.steps, "graphs", {}).items()}
        if number == 1:
            kept, places = graphs, [layer.qkv.data_ptr() for layer in find_engine(model).weights.layers]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.999)
    weights = find_engine(model).weights
    return {
        "rows": rows,
        "top_k": top_k,
        "prompt_tokens": len(prompt),
        "tokens_per_second": sorted(rounds[1:]),
        "first_round": rounds[0],
        "graphs_kept": all(graphs.get(key) == graph for key, graph in kept.items()),
        "weights_stay": places == [layer.qkv.data_ptr() for layer in weights.layers],
        "peak_gib": peak_memory_bytes(device) / 2**30,
    }


class Clock:
    """Adds up what wrapped functions take, the device waited for."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, defaultdict(float)

    def wrap(self, owner: Any, name: str, label: str) -> None:
        work: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            wait(self.device)
            began = time.perf_counter()
            result = work(*args, **kwargs)
            wait(self.device)
            self.seconds[label] += time.perf_counter() - began
            return result

        setattr(owner, name, timed)


def reward_at_random(completions: Any, **columns: Any) -> list[float]:
    return [float(random.random() < 0.5) for _ in completions]


def measure_steps(args: argparse.Namespace, run: Run, folder: Path) -> dict[str, Any]:
    asked = RewardArguments(
        run_dir=run.run_dir, lr_fraction=1e-4, rollout_batch_size=args.device_batch_size * args.accumulation
    )
    settings = {
        "per_device_train_batch_size": args.device_batch_size,
        "gradient_accumulation_steps": args.accumulation,
        "num_generations": args.generations,
        "max_completion_length": args.new_tokens,
        "max_steps": args.steps + 2,
        "top_k": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
    }
    training = RewardConfig(output_dir=str(folder / "checkpoints"), **settings)
    rows = args.device_batch_size * args.accumulation // args.generations * (args.steps + 2)
    tasks = [{"name": "WordProblems", "rows": rows}]
    trainer = build_trainer(
        asked, training, run, build_problems(tasks, open_problems(tasks, num_held_out=1)[0], seed=0)
    )
    trainer.reward_funcs = [reward_at_random]
    clock, ends = Clock(trainer.model.device), []
    clock.wrap(trainer.sampler, "sample", "rollout")
    clock.wrap(trainer, "_calculate_rewards", "reward")
    clock.wrap(trainer, "_compute_loss", "forward")
    clock.wrap(trainer.accelerator, "backward", "backward")
    log = trainer.log

    def note(*args: Any, **kwargs: Any) -> None:
        wait(clock.device)
        ends.append((time.perf_counter(), dict(clock.seconds)))
        log(*args, **kwargs)

    trainer.log = note
    create = trainer.create_optimizer
    trainer.create_optimizer = lambda *a, **k: (create(*a, **k), clock.wrap(trainer.optimizer, "step", "optimizer"))[0]
    trainer.train()
    (start, early), (end, late) = ends[1], ends[args.steps + 1]
    parts = {label: (late[label] - early.get(label, 0.0)) / args.steps for label in late}
    history = [entry for entry in trainer.state.log_history if "reward" in entry]
    last = {key: history[-1].get(key) for key in ("completions/mean_length", "sampling_logp_difference", "entropy")}
    return {
        "completions_per_step": args.device_batch_size * args.accumulation,
        "seconds_per_step": (end - start) / args.steps,
        "parts": parts | {"other": (end - start) / args.steps - sum(parts.values())},
        "rollout_tokens_per_second": [entry["rollout_tokens_per_second"] for entry in history],
        "last": last,
        "peak_gib": peak_memory_bytes(trainer.model.device) / 2**30,
    }


def main() -> None:
    args = parse()
    device = choose_device()
    found: dict[str, Any] = {"depth": args.depth, "torch": torch.__version__, "sampling": []}
    with tempfile.TemporaryDirectory() as place:
        run = Run(Path(place))
        make_stage(args, run)
        model, tokenizer = load_stage_model(run.folder("sft"))
        model.to(device)
        question = open_problems([{"name": "WordProblems"}], num_held_out=1)[0][0].read(0)[:-1]
        short = render_prompt(tokenizer, question)
        prompts = [short, (short * (args.long_prompt // len(short) + 1))[: args.long_prompt]]
        for prompt in prompts if args.long_prompt > len(short) else prompts[:1]:
            for rows, top_k in itertools.product(args.rows, args.top_k):
                found["sampling"].append(measure_sampling(args, model, tokenizer, prompt, rows=rows, top_k=top_k))
                print(json.dumps(found["sampling"][-1]), flush=True)
        del model
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        found["steps"] = measure_steps(args, run, Path(place))
    print(json.dumps(found["steps"]))
    if args.json:
        write_json(args.json, found)


if __name__ == "__main__":
    entry_point(main)

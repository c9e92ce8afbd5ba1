"""Does reinforcement learning help, whatever the seed? `python scripts/repeat_rl.py RUN --config .../grpo.yaml`.

Runs the stage from RUN's SFT model once a seed, each in a run folder of its own beside RUN (RUN-rl-1, ...), and puts
their changes on the same held-out problems together. What is finished is not done again. Further options go to
recipes/grpo.py. With `--parallel` so many at once, on one GPU as well.
"""

import argparse
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from chatmodel.launchers import LAUNCHER
from chatmodel.problems import combine_pass
from chatmodel.runs import Run
from chatmodel.runtime import UserError, entry_point, read_json, write_json

RECIPE = Path(__file__).parents[1] / "recipes" / "grpo.py"


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder whose SFT is finished")
    parser.add_argument("--config", type=Path, required=True, help="the stage's YAML file")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--parallel", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the result here, by default into RUN/rl_seeds.json")
    return parser.parse_known_args()


def prepare_run(source: Run, seed: int) -> Run:
    """A run folder that begins with the SFT model of another."""
    target = Run(source.run_dir.with_name(f"{source.run_dir.name}-rl-{seed}"))
    if source.read_result("sft") is None:
        raise UserError(f"{source.run_dir} has no finished SFT; run recipes/sft.py first, or scripts/speedrun.py")
    if not target.folder("sft").exists():
        shutil.copytree(source.folder("sft"), target.folder("sft"))
    write_json(target.result_path("sft"), source.read_result("sft"))
    return target


def run_seed(args: argparse.Namespace, others: list[str], seed: int) -> dict[str, Any]:
    target = prepare_run(Run(args.run), seed)
    command = [sys.executable, str(RECIPE), "--config", str(args.config), "--run_dir", str(target.run_dir)]
    with (target.run_dir / "rl.log").open("a") as log:
        done = subprocess.run(
            [*command, "--seed", str(seed), *others],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {LAUNCHER: str(os.getpid())},
            check=False,
        )
    if done.returncode:
        last = (target.run_dir / "rl.log").read_text().strip().splitlines()[-1:]
        raise UserError(f"seed {seed} failed, see {target.run_dir / 'rl.log'}: {''.join(last)}")
    return read_json(target.result_path("rl"))["metrics"]


def read_pass(metrics: dict[str, Any], when: str) -> dict[str, Any]:
    """What was measured before or after, in the form that `combine_pass` takes."""
    sampled = metrics["sampled"][when]
    return metrics["pass_at_1"][when] | ({"sampled": sampled} if sampled else {})


def main() -> None:
    args, others = parse()
    with ThreadPoolExecutor(args.parallel) as pool:
        found = list(pool.map(lambda seed: run_seed(args, others, seed), args.seeds))
    combined = combine_pass([(read_pass(metrics, "before"), read_pass(metrics, "after")) for metrics in found])
    seeds = [
        {"seed": seed, "change": metrics["change"], "train_seconds": metrics["train_seconds"]}
        | {when: metrics["pass_at_1"][when]["correct"] for when in ("before", "after")}
        for seed, metrics in zip(args.seeds, found, strict=True)
    ]
    for each in seeds:
        print(f"seed {each['seed']}: greedy {each['before']} -> {each['after']}, {each['train_seconds']:.0f} s")
    for name, change in combined.items():
        print(
            f"{name}: {change['difference']:+.4f} ± {change['stderr']:.4f} (paired over problems), "
            f"± {change['seed_stderr']:.4f} over {change['num_seeds']} seeds"
        )
    write_json(args.json or args.run / "rl_seeds.json", {"task": found[0]["task"], "seeds": seeds, "change": combined})


if __name__ == "__main__":
    entry_point(main)

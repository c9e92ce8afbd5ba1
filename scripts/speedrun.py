"""Run the whole pipeline, from text to report, continuing with the first stage that is not finished."""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from chatmodel.runs import Run
from chatmodel.runtime import UserError, entry_point, read_json, requested_settings

ROOT = Path(__file__).resolve().parents[1]

# stage, recipe, config file, flags of its own
STAGES = (
    ("tokenizer", "train_tokenizer.py", "tokenizer.yaml", ()),
    ("base", "pretrain.py", "pretrain.yaml", ()),
    ("base_eval", "eval.py", "eval.yaml", ("--stage", "base")),
    ("mid", "sft.py", "midtrain.yaml", ("--stage", "mid")),
    ("mid_eval", "eval.py", "eval.yaml", ("--stage", "mid")),
    ("sft", "sft.py", "sft.yaml", ("--stage", "sft")),
    ("sft_eval", "eval.py", "eval.yaml", ("--stage", "sft")),
    ("rl", "grpo.py", "grpo.yaml", ()),
    ("rl_eval", "eval.py", "eval.yaml", ("--stage", "rl")),
)
TRAINING_STAGES = ("base", "mid", "sft", "rl")


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--preset", default="cpu", help="a folder of recipes/configs, or the path of your own")
    parser.add_argument("--run_dir", type=Path, help="the run folder; by default runs/<preset>")
    parser.add_argument("--dataset", help="text: a Hub name, a folder, or 'embedded'; by default the preset's")
    parser.add_argument("--eval_bundle", help="CORE bundle: zip, folder, or the address of a zip")
    parser.add_argument("--chatcore", type=Path, help="folder of ChatCORE's data sets; by default the Hub's")
    parser.add_argument("--max_per_task", type=int, help="examples of each CORE and ChatCORE task")
    parser.add_argument("--run_generated_code", action="store_true", help="HumanEval: run programs the model wrote")
    parser.add_argument("--accelerate_config", type=Path, help="launch training stages with this Accelerate file")
    parser.add_argument("--hourly_rate", type=float, help="price of the machine in USD, for the report")
    args = parser.parse_args()
    args.preset = find_preset(args.preset)
    # Stages run in the project's folder, wherever this command was given.
    for option in ("dataset", "eval_bundle", "chatcore", "accelerate_config"):
        value = getattr(args, option)
        if value is not None and Path(value).exists():
            setattr(args, option, type(value)(Path(value).resolve()))
    return args


def find_preset(preset: str) -> Path:
    presets = ROOT / "recipes" / "configs"
    for folder in (presets / preset, Path(preset).resolve()):
        if folder.is_dir():
            missing = sorted({config for _, _, config, _ in STAGES if not (folder / config).is_file()})
            if missing:
                raise UserError(f"preset {preset!r} lacks {', '.join(missing)}; copy them from recipes/configs/gpu")
            return folder
    whole = sorted(path.parent.name for path in presets.glob("*/eval.yaml"))
    raise UserError(f"preset {preset!r} is neither one of {', '.join(whole)} nor the path of a folder")


def shorten(path: Path) -> str:
    """Relative to the project's folder where it lies inside, as a person would type it there."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def build_command(stage: tuple[str, str, str, tuple[str, ...]], args: argparse.Namespace, run: Run) -> list[str]:
    name, recipe, config, flags = stage
    command = [f"recipes/{recipe}", "--config", shorten(args.preset / config)]
    command += ["--run_dir", shorten(run.run_dir), *flags]
    if args.dataset and name in ("tokenizer", "base"):
        command += ["--dataset", args.dataset]
    if args.chatcore and name in ("mid", "sft", "rl"):
        command += ["--chatcore", str(args.chatcore)]
    if name.endswith("_eval"):
        for option in ("eval_bundle", "chatcore", "max_per_task"):
            if getattr(args, option) is not None:
                command += [f"--{option}", str(getattr(args, option))]
        command += ["--run_generated_code"] if args.run_generated_code else []
    return command


def launch(name: str, command: list[str], accelerate_config: Path | None) -> None:
    start = [sys.executable]
    if accelerate_config is not None and name in TRAINING_STAGES:
        start += ["-m", "accelerate.commands.launch", "--quiet", "--config_file", str(accelerate_config)]
    code = subprocess.run([*start, *command], check=False).returncode
    if code:
        raise UserError(f"stage {name} ended with exit code {code}; mend what it says above and start again")


def show_conversation(run: Run) -> None:
    for stage in ("rl_eval", "sft_eval"):
        result = run.read_result(stage)
        samples = result["metrics"].get("samples") if result else None
        if samples:
            for message in samples[0]["messages"]:
                print(f"{message['role']}: {message['content']}")
            return


def main() -> None:
    args = read_arguments()
    run = Run(args.run_dir.resolve() if args.run_dir else ROOT / "runs" / args.preset.name)
    os.chdir(ROOT)
    began = time.monotonic()
    for number, stage in enumerate(STAGES, start=1):
        name, command = stage[0], build_command(stage, args, run)
        if run.is_finished(name, settings=requested_settings(command[1:])):
            print(f"[{number}/{len(STAGES)}] {name}: finished before")
            continue
        print(f"[{number}/{len(STAGES)}] {name}", flush=True)
        launch(name, command, args.accelerate_config)
        seconds = read_json(run.result_path(name))["seconds"]
        print(f"[{number}/{len(STAGES)}] {name}: {seconds:.0f} s, {(time.monotonic() - began) / 60:.1f} min in all")
    report = ["recipes/report.py", "--run_dir", shorten(run.run_dir)]
    launch("report", report + (["--hourly_rate", str(args.hourly_rate)] if args.hourly_rate else []), None)
    show_conversation(run)


if __name__ == "__main__":
    entry_point(main)

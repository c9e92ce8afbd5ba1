"""Run the whole pipeline, from text to report, continuing with the first stage that is not finished."""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

from chatmodel.arguments import requested_settings
from chatmodel.launchers import Launch
from chatmodel.report.tables import write_content
from chatmodel.runs import Run
from chatmodel.runtime import UserError, entry_point, read_json

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
WORDS = "words.txt.gz"  # in a folder of conversations: the words that spelling is taught and tested with


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--preset", default="cpu", help="a folder of recipes/configs, or the path of your own")
    parser.add_argument("--run_dir", type=Path, help="the run folder; by default runs/<preset>")
    parser.add_argument("--dataset", help="text: a Hub name, a folder, or 'embedded'; by default the preset's")
    parser.add_argument("--eval_bundle", help="CORE bundle: zip, folder, or the address of a zip")
    parser.add_argument("--chatcore", type=Path, help="folder of ChatCORE's data sets; by default the Hub's")
    parser.add_argument("--conversations", type=Path, help="folder of conversations in place of the Hub's")
    parser.add_argument("--max_per_task", type=int, help="examples of each CORE and ChatCORE task")
    parser.add_argument("--run_generated_code", action="store_true", help="HumanEval: run programs the model wrote")
    parser.add_argument("--accelerate_config", type=Path, help="launch training stages with this Accelerate file")
    parser.add_argument("--hourly_rate", type=float, help="price of the machine in USD, for the report")
    parser.add_argument("--beside", type=Path, help="another run's folder, for the report: its numbers beside ours")
    parser.add_argument(
        "--until", choices=[stage[0] for stage in STAGES], help="stop after this stage; by default none"
    )
    parser.add_argument("--prepare", action="store_true", help="only what needs no GPU: tokenizer and token store")
    args = parser.parse_args()
    args.preset = find_preset(args.preset)
    # Stages run in the project's folder, wherever this command was given.
    for option in ("dataset", "eval_bundle", "chatcore", "conversations", "accelerate_config", "beside"):
        value = getattr(args, option)
        if value is not None and Path(value).exists():
            setattr(args, option, type(value)(shorten(Path(value).resolve())))
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
    if args.conversations and name in ("mid", "sft"):
        command += ["--conversations", str(args.conversations)]
    if name.endswith("_eval"):
        if name != "base_eval" and args.conversations and (args.conversations / WORDS).is_file():
            command += ["--words", str(args.conversations / WORDS)]
        for option in ("eval_bundle", "chatcore", "max_per_task"):
            if getattr(args, option) is not None:
                command += [f"--{option}", str(getattr(args, option))]
        command += ["--run_generated_code"] if args.run_generated_code else []
    return command


def launch(name: str, command: list[str], accelerate_config: Path | None) -> None:
    start = [sys.executable]
    by_launcher = accelerate_config is not None and name in TRAINING_STAGES
    if by_launcher:
        start += ["-m", "accelerate.commands.launch", "--quiet", "--config_file", str(accelerate_config)]
    launched = Launch([*start, *command], name=f"stage {name}", by_launcher=by_launcher)
    code = launched.run()
    if launched.received is not None:
        sys.exit(128 + launched.received)  # as shells say which signal it was
    if code:
        raise UserError(f"stage {name} ended with exit code {code}; mend what it says above and start again")


def prepare(args: argparse.Namespace, run: Run) -> None:
    """The tokenizer and the token store, with which pretraining starts at once."""
    command = build_command(STAGES[0], args, run)
    if not run.is_finished("tokenizer", settings=requested_settings(command[1:])):
        launch("tokenizer", command, None)
    command = build_command(STAGES[1], args, run)
    launch("prepare_data", ["scripts/prepare_data.py", *command[1:]], None)


def write_report(args: argparse.Namespace, run: Run) -> None:
    command = ["recipes/report.py", "--run_dir", shorten(run.run_dir)]
    command += ["--hourly_rate", str(args.hourly_rate)] if args.hourly_rate else []
    launch("report", command + (["--beside", shorten(args.beside)] if args.beside else []), None)


def find_conversation(run: Run) -> list[dict[str, Any]]:
    """A sample conversation of the last chat model that ends with an answer; empty where there is none."""
    for stage in ("rl_eval", "sft_eval"):
        result = run.read_result(stage)
        for sample in (result["metrics"].get("samples") or []) if result else []:
            messages = sample.get("messages") or []
            if messages and messages[-1]["role"] == "assistant" and write_content(messages[-1]["content"]).strip():
                return messages
    return []


def show_outcome(run: Run) -> None:
    """What the model says, and what to do with it next."""
    for message in find_conversation(run):
        print(f"{message['role']}: {write_content(message['content'])}")
    sft, rl = shorten(run.folder("sft")), shorten(run.folder("rl"))
    print(f"\nThe report: {shorten(run.folder('report.html'))}")
    print(f"Talk to the model: .venv/bin/python scripts/chat_cli.py {rl}")
    print(f"In the browser, before and after RL: .venv/bin/python scripts/chat_web.py {sft} {rl}")


def main() -> None:
    args = read_arguments()
    run = Run(args.run_dir.resolve() if args.run_dir else ROOT / "runs" / args.preset.name)
    os.chdir(ROOT)
    if args.prepare:
        prepare(args, run)
        return
    began = time.monotonic()
    for number, stage in enumerate(STAGES, start=1):
        name, command = stage[0], build_command(stage, args, run)
        if run.is_finished(name, settings=requested_settings(command[1:])):
            print(f"[{number}/{len(STAGES)}] {name}: finished before")
        else:
            print(f"[{number}/{len(STAGES)}] {name}", flush=True)
            launch(name, command, args.accelerate_config)
            seconds = read_json(run.result_path(name))["seconds"]
            print(
                f"[{number}/{len(STAGES)}] {name}: {seconds:.0f} s, {(time.monotonic() - began) / 60:.1f} min in all"
            )
        if name == args.until:
            break
    write_report(args, run)
    show_outcome(run)


if __name__ == "__main__":
    entry_point(main)

"""Talk to a model folder in the terminal: `python scripts/chat_cli.py runs/cpu/sft`."""

import argparse
from collections.abc import Callable
from pathlib import Path


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("model", type=Path, help="a model folder")
    parser.add_argument("--prompt", help="answer this one question and end")
    parser.add_argument("--system", default="", help="instructions for the whole conversation")
    parser.add_argument("--temperature", type=float, default=0.6, help="0 is greedy")
    parser.add_argument("--top_k", type=int, default=50)
    parser.add_argument("--max_new_tokens", type=int, default=256)
    args = parser.parse_args()
    if not args.model.is_dir():
        parser.error(f"folder {args.model} does not exist; give a model folder, such as runs/cpu/sft")
    if args.prompt is not None and not args.prompt.strip():
        parser.error("--prompt is empty; give it a question, or leave it out to talk")
    return args


def enable_line_editing(complete_command: Callable[[str, int], str | None]) -> None:
    """Give input() arrow keys, a history of what was typed, and Tab for commands."""
    try:
        import readline
    except ImportError:  # there is none on Windows
        return
    readline.set_completer_delims(" \t\n")
    readline.set_completer(complete_command)
    readline.parse_and_bind("tab: complete")


def main() -> None:
    args = read_arguments()
    # Imported here, as they take seconds that --help or a wrong path should not.
    from chatmodel.chat.conversation import Sampling
    from chatmodel.chat.terminal import Terminal, complete_command
    from chatmodel.devices import choose_device
    from chatmodel.posttraining import load_stage_model

    sampling = Sampling(top_k=args.top_k, max_new_tokens=args.max_new_tokens).with_temperature(args.temperature)
    model, tokenizer = load_stage_model(args.model)
    model.to(choose_device()).eval()
    terminal = Terminal(model, tokenizer, system=args.system, sampling=sampling)
    if args.prompt is None:
        enable_line_editing(complete_command)
        terminal.run()
        return
    terminal.conversation.ask(args.prompt)
    terminal.answer()


if __name__ == "__main__":
    read_arguments()
    from chatmodel.runtime import entry_point

    entry_point(main)

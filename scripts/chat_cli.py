"""Talk to a model folder in the terminal: `python scripts/chat_cli.py runs/cpu/sft`."""

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from chatmodel.generation import parse_reply, split_marks, stream_reply
from chatmodel.posttraining import load_stage_model
from chatmodel.runtime import UserError, choose_device, entry_point

HELP = "/reset forgets, /system TEXT sets instructions, /temperature X, /save FILE, /quit; end a line with \\ to go on"
# How the calculator's marks are shown: a call and its result as [12+30 = 42].
SHOWN_MARKS = {"<|python_start|>": "[", "<|python_end|>": "", "<|output_start|>": " = ", "<|output_end|>": "]"}


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("model", type=Path, help="a model folder")
    parser.add_argument("--prompt", help="answer this one question and end")
    parser.add_argument("--system", default="", help="instructions for the whole conversation")
    parser.add_argument("--temperature", type=float, default=0.6, help="0 is greedy")
    parser.add_argument("--top_k", type=int, default=50)
    parser.add_argument("--max_new_tokens", type=int, default=256)
    return parser.parse_args()


def answer(
    console: Console, model: Any, tokenizer: Any, messages: list[dict[str, Any]], options: dict[str, Any]
) -> str:
    """Print the reply as it comes and return its text; Ctrl-C stops the answer, not the program."""
    reply, inside = "", False
    try:
        for piece in split_marks(stream_reply(model, tokenizer, messages, **options)):
            reply += piece
            inside = inside or piece == "<|python_start|>"
            shown = SHOWN_MARKS.get(piece, piece)
            console.print(shown, style="cyan" if inside else None, markup=False, end="")
            inside = inside and piece != "<|output_end|>"
    except KeyboardInterrupt:
        console.print(" [stopped]", style="dim", markup=False)
    console.print()
    return reply


class Chat:
    """One conversation: its messages and settings."""

    def __init__(self, system: str, options: dict[str, Any]) -> None:
        self.system, self.options = system, options
        self.messages: list[dict[str, Any]] = []

    def with_system(self) -> list[dict[str, Any]]:
        return ([{"role": "system", "content": self.system}] if self.system else []) + self.messages

    def command(self, line: str) -> str:
        """Carry out a /command; returns what to say."""
        name, _, value = line.partition(" ")
        match name:
            case "/reset":
                self.messages = []
                return "a new conversation"
            case "/system":
                self.system, self.messages = value, []
                return "instructions set, a new conversation"
            case "/temperature":
                try:
                    self.options["temperature"] = float(value)
                except ValueError:
                    return f"{value!r} is no number"
                return f"temperature {value}"
            case "/save":
                Path(value or "chat.json").write_text(json.dumps({"messages": self.with_system()}, indent=1) + "\n")
                return f"saved {value or 'chat.json'}"
        return HELP


def read_line(console: Console) -> str:
    line = console.input("[bold green]you:[/] ")
    while line.endswith("\\"):
        line = line[:-1] + "\n" + console.input("... ")
    return line.strip()


def main() -> None:
    args = read_arguments()
    console = Console(highlight=False, soft_wrap=True)
    model, tokenizer = load_stage_model(args.model)
    model.to(choose_device()).eval()
    options = {"temperature": args.temperature, "top_k": args.top_k, "max_new_tokens": args.max_new_tokens}
    chat = Chat(args.system, options)
    if args.prompt is not None:
        chat.messages = [{"role": "user", "content": args.prompt}]
        answer(console, model, tokenizer, chat.with_system(), options)
        return
    console.print(HELP, style="dim")
    while True:
        try:
            line = read_line(console)
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if line in ("/quit", "/exit"):
            return
        if line.startswith("/"):
            console.print(escape(chat.command(line)), style="dim")
        elif line:
            chat.messages.append({"role": "user", "content": line})
            console.print("[bold blue]model:[/] ", end="")
            try:
                reply = answer(console, model, tokenizer, chat.with_system(), chat.options)
            except UserError as error:
                chat.messages.pop()
                console.print(escape(str(error)), style="red")
                continue
            chat.messages.append({"role": "assistant", "content": parse_reply(reply) or " "})


if __name__ == "__main__":
    entry_point(main)

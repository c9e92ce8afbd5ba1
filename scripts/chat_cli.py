"""Talk to a model folder in the terminal: `python scripts/chat_cli.py runs/cpu/sft`."""

import argparse
import json
import math
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from chatmodel.generation import parse_reply, split_marks, stream_reply
from chatmodel.posttraining import load_stage_model
from chatmodel.runtime import UserError, choose_device, entry_point

with suppress(ImportError):  # there is none on Windows
    import readline  # noqa: F401 (gives input() arrow keys and a history)

HELP = (
    "/reset forgets, /system TEXT sets instructions, /temperature X, /save FILE adds the conversation to a .jsonl "
    "file, /quit; end a line with \\ to go on; Ctrl-C stops an answer"
)
# How the calculator's marks are shown: a call and its result as [12+30 = 42].
SHOWN_MARKS = {"<|python_start|>": "[", "<|python_end|>": "", "<|output_start|>": " = ", "<|output_end|>": "]"}
# A model may well write the characters that steer a terminal.
CONTROL_CHARACTERS = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), 127) if chr(code) not in "\n\t"}


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("model", type=Path, help="a model folder")
    parser.add_argument("--prompt", help="answer this one question and end")
    parser.add_argument("--system", default="", help="instructions for the whole conversation")
    parser.add_argument("--temperature", type=float, default=0.6, help="0 is greedy")
    parser.add_argument("--top_k", type=int, default=50)
    parser.add_argument("--max_new_tokens", type=int, default=256)
    return parser.parse_args()


def show_calls(pieces: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Text to show, and whether it belongs to a calculator call; a call without a result ends as [abc]."""
    inside = asked = False
    for piece in pieces:
        if asked and piece != "<|output_start|>":  # the calculator refused
            yield "]", True
            inside = False
        asked = piece == "<|python_end|>"
        inside = inside or piece == "<|python_start|>"
        yield SHOWN_MARKS.get(piece, piece.translate(CONTROL_CHARACTERS)), inside
        inside = inside and piece != "<|output_end|>"
    if inside:
        yield "]", True


def keep(pieces: Iterable[str], received: list[str]) -> Iterator[str]:
    """The pieces as they are, with all that came so far in `received`."""
    for piece in pieces:
        received.append(piece)
        yield piece


def answer(console: Console, model: Any, tokenizer: Any, chat: "Chat", label: str = "") -> str:
    """Print `label` and the reply as it comes, and return its text; Ctrl-C stops the answer, not the program."""
    received: list[str] = []
    try:
        with closing(stream_reply(model, tokenizer, chat.with_system(), **chat.options)) as stream:
            for shown, is_call in show_calls(split_marks(keep(stream, received))):
                console.print(label, style="bold blue", end="")
                console.print(shown, style="cyan" if is_call else None, end="")
                label = ""
    except KeyboardInterrupt:
        console.print(" [stopped]", style="dim", end="")
    console.print()
    return "".join(received)


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
        value = value.strip()
        match name:
            case "/reset":
                self.messages = []
                return "a new conversation"
            case "/system":
                self.system, self.messages = value, []
                return f"{'instructions set' if value else 'no instructions'}, a new conversation"
            case "/temperature":
                return self.set_temperature(value)
            case "/save":
                return self.save(Path(value or "chat.jsonl"))
        return HELP

    def set_temperature(self, value: str) -> str:
        try:
            temperature = float(value)
        except ValueError:
            return f"the temperature is {self.options['temperature']}, and {value!r} is no number"
        if not (temperature >= 0 and math.isfinite(temperature)):
            return f"the temperature is {self.options['temperature']}; {value} must be 0 (greedy) or more"
        self.options["temperature"] = temperature
        return f"the temperature is {temperature}"

    def save(self, path: Path) -> str:
        """Add the conversation to `path` as a line that the training recipes read."""
        if not self.messages:
            return "there is nothing to save yet"
        try:
            with path.open("a") as file:
                file.write(json.dumps({"messages": self.with_system()}, ensure_ascii=False) + "\n")
        except OSError as error:
            return f"{path} cannot be written: {error.strerror}"
        return f"added to {path}"

    def add_reply(self, reply: str) -> bool:
        """Keep the reply to the last question; without any text in it, forget both (an empty turn has no form)."""
        parts = parse_reply(reply)
        if not any(part["text"].strip() for part in parts):
            self.messages.pop()
            return False
        self.messages.append({"role": "assistant", "content": parts})
        return True


def read_line() -> str:
    line = input("you: ")
    while line.endswith("\\"):
        line = line[:-1] + "\n" + input("... ")
    return line.strip()


def converse(console: Console, model: Any, tokenizer: Any, chat: Chat) -> None:
    """Take turns until /quit, or Ctrl-C or Ctrl-D at the prompt."""
    console.print(HELP, style="dim")
    while True:
        try:
            line = read_line()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if line in ("/quit", "/exit"):
            return
        if line.startswith("/"):
            console.print(chat.command(line), style="dim")
        elif line:
            chat.messages.append({"role": "user", "content": line})
            try:
                reply = answer(console, model, tokenizer, chat, label="model: ")
            except UserError as error:
                chat.messages.pop()
                console.print(f"{error} (/reset)", style="red")
                continue
            if not chat.add_reply(reply):
                console.print("no answer; the question is forgotten", style="dim")


def main() -> None:
    args = read_arguments()
    # Text is shown as it is: without rich's markup, its ":emoji:" names, colours for numbers, or line breaks.
    console = Console(markup=False, emoji=False, highlight=False, soft_wrap=True)
    model, tokenizer = load_stage_model(args.model)
    model.to(choose_device()).eval()
    options = {"temperature": args.temperature, "top_k": args.top_k, "max_new_tokens": args.max_new_tokens}
    chat = Chat(args.system, options)
    if args.prompt is None:
        converse(console, model, tokenizer, chat)
        return
    chat.messages = [{"role": "user", "content": args.prompt}]
    answer(console, model, tokenizer, chat)


if __name__ == "__main__":
    entry_point(main)

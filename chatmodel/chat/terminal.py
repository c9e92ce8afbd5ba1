"""A conversation in a terminal: its commands, what is typed, and answers as they come."""

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from rich.console import Console

from chatmodel.chat.conversation import Conversation, Sampling
from chatmodel.chat.display import CONTROL_CHARACTERS, show_calls
from chatmodel.generation import split_marks
from chatmodel.runtime import UserError

COMMANDS = {
    "/reset": "forget the conversation, keep the settings",
    "/system TEXT": "set instructions (none without TEXT) and begin a new conversation",
    "/temperature X": "0 is greedy, higher is bolder; without X, show it",
    "/retry": "answer the last question again",
    "/tokens": "how much of the model's context is used, and how the last answer divides into tokens",
    "/save FILE": "add the conversation to a .jsonl file that the training recipes read",
    "/help": "this list",
    "/quit": "leave (as Ctrl-D does)",
}
HINT = '/help lists the commands; """ or a \\ at its end makes a question longer than a line; Ctrl-C stops an answer'
NEARLY_FULL = 0.85  # of the context


class Terminal:
    """Takes turns between a person and a model.

    Args:
        read: as `input`: shows a prompt and returns a line.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        system: str = "",
        sampling: Sampling | None = None,
        console: Console | None = None,
        read: Callable[[str], str] = input,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.conversation = Conversation(system)
        self.sampling = sampling or Sampling()
        # Text is shown as it is: without rich's markup, its ":emoji:" names, colours for numbers, or line breaks.
        self.console = console or Console(markup=False, emoji=False, highlight=False, soft_wrap=True)
        self.read = read
        self.seconds = 0.0
        self.ids: list[int] = []  # of the last answer

    def run(self) -> None:
        """Take turns until /quit or Ctrl-D at the prompt."""
        self.say(HINT)
        while True:
            try:
                line = self.read_message()
                if line in ("/quit", "/exit"):
                    return
                self.take_turn(line)
            except EOFError:
                self.console.print()
                return
            except KeyboardInterrupt:
                self.conversation.forget_open_question()
                self.console.print()
                self.say("(/quit or Ctrl-D leaves)")

    def say(self, text: str, style: str = "dim") -> None:
        self.console.print(text, style=style)

    def read_message(self) -> str:
        """What is typed: a line, lines that end in a backslash and the next one, or lines between triple quotes."""
        line = self.read("you: ")
        if line.lstrip().startswith('"""'):
            return self.read_quoted(line.lstrip()[3:])
        while line.endswith("\\"):
            line = line[:-1] + "\n" + self.read("... ")
        return line.strip()

    def read_quoted(self, text: str) -> str:
        while not text.rstrip().endswith('"""'):
            text += "\n" + self.read("... ")
        return text.rstrip()[:-3].strip()

    def take_turn(self, line: str) -> None:
        """Answer a question, or carry out a command."""
        try:
            if line == "/retry":
                self.retry()
            elif line.startswith("/"):
                self.say(self.command(line))
            elif line:
                self.conversation.ask(line)
                self.reply()
        except UserError as error:
            self.say(str(error), style="red")

    def retry(self) -> None:
        kept = list(self.conversation.messages)
        if not self.conversation.forget_answer():
            raise UserError("there is no question to answer again")
        try:
            self.reply()
        except UserError:
            self.conversation.messages = kept
            raise

    def reply(self) -> None:
        """Show and keep the answer to the last question.

        Raises:
            UserError: the conversation does not fit the context; the question is taken back.
        """
        try:
            text = self.answer(label="model: ")
        except UserError as error:
            self.conversation.forget_open_question()
            raise UserError(f"{error} (/reset does that; /tokens counts)") from None
        if not self.conversation.add_reply(text, self.ids):
            self.say("no answer; the question is forgotten")
        else:
            self.tell_of_full_context()

    def answer(self, label: str = "") -> str:
        """Print `label` and the reply as it comes, and return its text; Ctrl-C stops the answer, not the program."""
        received: list[str] = []
        self.ids = []
        began = time.monotonic()
        try:
            with closing(self.stream()) as stream:
                for shown, is_call in show_calls(split_marks(keep(stream, received))):
                    self.console.print(label, style="bold blue", end="")
                    self.console.print(shown, style="cyan" if is_call else None, end="")
                    label = ""
        except KeyboardInterrupt:
            self.console.print(" [stopped]", style="dim", end="")
        self.console.print()
        self.seconds = time.monotonic() - began
        return "".join(received)

    def stream(self) -> Generator[str, None, None]:
        return self.conversation.stream_answer(self.model, self.tokenizer, self.sampling, ids=self.ids)

    def tell_of_full_context(self) -> None:
        context = getattr(self.model.config, "max_position_embeddings", None)
        used = self.conversation.count_tokens(self.tokenizer)
        if context is not None and used > NEARLY_FULL * context:
            self.say(f"{used} of the context's {context} tokens are used; /reset begins anew")

    def command(self, line: str) -> str:
        """Carry out a /command; returns what to say.

        Raises:
            UserError: it cannot be carried out.
        """
        name, _, value = line.partition(" ")
        value = value.strip()
        match name:
            case "/reset":
                self.conversation.restart()
                return "a new conversation"
            case "/system":
                self.conversation.restart(system=value)
                return f"{'instructions set' if value else 'no instructions'}, a new conversation"
            case "/temperature":
                if value:
                    self.sampling = self.sampling.with_temperature(value)
                return f"the temperature is {self.sampling.temperature}"
            case "/tokens":
                return self.describe_tokens()
            case "/save":
                path = Path(value or "chat.jsonl")
                self.conversation.save(path)
                return f"added to {path}"
            case "/help":
                return "\n".join(f"{command:<15} {meaning}" for command, meaning in COMMANDS.items())
        return f"there is no command {name}; /help lists them"

    def describe_tokens(self) -> str:
        """How much of the context is used, and the last answer's tokens."""
        context = getattr(self.model.config, "max_position_embeddings", None)
        used = self.conversation.count_tokens(self.tokenizer)
        lines = [f"the conversation takes {used} tokens" + (f" of the context's {context}" if context else "")]
        _, ids = self.conversation.split_at_answer(self.tokenizer)
        if ids:
            pieces = "|".join(self.tokenizer.decode([token_id]).translate(CONTROL_CHARACTERS) for token_id in ids)
            lines.append(f"the last answer: {len(ids)} tokens in {self.seconds:.2f} s: {pieces}")
        return "\n".join(lines)


def keep(pieces: Iterable[str], received: list[str]) -> Iterator[str]:
    """The pieces as they are, with all that came so far in `received`."""
    for piece in pieces:
        received.append(piece)
        yield piece


def complete_command(text: str, state: int) -> str | None:
    """For readline's Tab: the commands that begin with `text`."""
    names = [command.partition(" ")[0] for command in COMMANDS]
    fitting = [name for name in names if text and name.startswith(text)]
    return fitting[state] if state < len(fitting) else None

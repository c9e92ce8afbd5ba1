"""What has been said so far, and with which settings the next answer is drawn."""

import json
import math
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from chatmodel.conversations.render import render_conversation, render_prompt
from chatmodel.generation import parse_reply, stream_reply
from chatmodel.runtime import UserError

Message = dict[str, Any]


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn: `temperature` 0 is greedy, `top_k` None draws from all tokens."""

    temperature: float = 0.6
    top_k: int | None = 50
    max_new_tokens: int = 256

    def with_temperature(self, value: str | float) -> "Sampling":
        """The same settings with another temperature.

        Raises:
            UserError: it is no number of 0 or more.
        """
        try:
            temperature = float(value)
        except ValueError:
            raise UserError(f"the temperature {value!r} is no number; give 0 (greedy) or more") from None
        if not (temperature >= 0 and math.isfinite(temperature)):
            raise UserError(f"the temperature {value} must be 0 (greedy) or more")
        return replace(self, temperature=temperature)


@dataclass
class Conversation:
    """One conversation; user and assistant take turns in `messages`, `system` goes before them.

    `answer_ids` are those of the last answer as the model chose them; it may cut words otherwise than the tokenizer.
    """

    system: str = ""
    messages: list[Message] = field(default_factory=list)
    answer_ids: tuple[int, ...] = ()

    def with_system(self) -> list[Message]:
        return ([{"role": "system", "content": self.system}] if self.system else []) + self.messages

    def ask(self, question: str) -> None:
        self.messages.append({"role": "user", "content": question})
        self.answer_ids = ()

    def stream_answer(
        self, model: Any, tokenizer: Any, sampling: Sampling, *, ids: list[int] | None = None
    ) -> Generator[str, None, None]:
        """The answer to the last question, as `stream_reply` gives it; it is not kept. `ids` gets its tokens."""
        yield from stream_reply(model, tokenizer, self.with_system(), ids=ids, **asdict(sampling))

    def add_reply(self, reply: str, ids: Sequence[int] = ()) -> bool:
        """Keep the reply to the last question; without any text in it, forget both (an empty turn has no form)."""
        parts = parse_reply(reply)
        if not any(part["text"].strip() for part in parts):
            self.messages.pop()
            return False
        self.messages.append({"role": "assistant", "content": parts})
        self.answer_ids = tuple(ids)
        return True

    def forget_answer(self) -> bool:
        """Go back to the last question, to have it answered again; False where there is none."""
        if not self.messages:
            return False
        if not self.has_open_question():
            self.messages.pop()
        self.answer_ids = ()
        return True

    def has_open_question(self) -> bool:
        return bool(self.messages) and self.messages[-1]["role"] == "user"

    def forget_open_question(self) -> None:
        """Take back a question that has no answer."""
        if self.has_open_question():
            self.messages.pop()

    def restart(self, system: str | None = None) -> None:
        """Forget what was said; with `system`, begin under other instructions."""
        self.messages, self.answer_ids = [], ()
        self.system = self.system if system is None else system

    def count_tokens(self, tokenizer: Any) -> int:
        """How many tokens of the model's context it takes, with the mark that opens the answer it waits for."""
        return len(self.render(tokenizer)) if self.messages else 0

    def render(self, tokenizer: Any) -> list[int]:
        """Its ids: a prompt while it waits for an answer, else the whole conversation."""
        if self.has_open_question():
            return render_prompt(tokenizer, self.with_system())
        return render_conversation(tokenizer, self.with_system()).input_ids

    def split_at_answer(self, tokenizer: Any) -> tuple[list[int], list[int]]:
        """The ids of the last question with all before it, and those of its answer; none before the first answer.

        The answer's are those that came, or else its text encoded, with an end token.
        """
        if not self.messages or self.has_open_question():
            return [], []
        asked = Conversation(self.system, self.messages[:-1]).render(tokenizer)
        return asked, list(self.answer_ids) or self.render(tokenizer)[len(asked) :]

    def to_json(self) -> str:
        """One line that the training recipes read."""
        return json.dumps({"messages": self.with_system()}, ensure_ascii=False)

    def save(self, path: Path) -> None:
        """Add the conversation to `path` as a line.

        Raises:
            UserError: there is nothing to save, or no such place.
        """
        if not self.messages:
            raise UserError("there is nothing to save yet")
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(self.to_json() + "\n")
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}") from None

"""What a web page does on which one model is talked to, or several side by side, and looked into."""

import json
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from queue import Queue
from threading import Event, Thread
from typing import Any, NamedTuple

from chatmodel.chat import inspector
from chatmodel.chat.conversation import Conversation, Sampling
from chatmodel.chat.display import as_html, escape_all, show_parts
from chatmodel.chat.inspection import inspect_layers, inspect_tokens
from chatmodel.generation import parse_reply
from chatmodel.runtime import UserError, logger

MAX_QUESTION_CHARS, MAX_SYSTEM_CHARS = 32_000, 8_000
Conversations = list[Conversation]


@dataclass(frozen=True)
class Voice:
    """A model that takes part, under the name that is shown for it."""

    name: str
    model: Any
    tokenizer: Any


class Piece(NamedTuple):
    """A piece of the answer of one voice, or why it has none."""

    place: int
    text: str | UserError


class ChatPage:
    """What the page does, apart from how it is laid out (`layout`); conversations are one for each voice.

    Args:
        pause: seconds between two looks at an answer that comes; each look is drawn anew as a whole.
    """

    def __init__(self, voices: Sequence[Voice], *, pause: float = 0.05) -> None:
        self.voices, self.pause = list(voices), pause
        self.stops: dict[str, Event] = {}

    def begin(self, system: str = "") -> Conversations:
        return [Conversation(system.strip()) for _ in self.voices]

    def ask(self, question: str, conversations: Conversations, system: str) -> Conversations:
        """The conversations with a question at their ends; they begin anew if the instructions have changed.

        Raises:
            UserError: the question is empty, or it or the instructions are very long.
        """
        if not question.strip():
            raise UserError("the question is empty")
        if len(question) > MAX_QUESTION_CHARS:
            raise UserError(f"the question has {len(question)} characters; at most {MAX_QUESTION_CHARS} are taken")
        if len(system) > MAX_SYSTEM_CHARS:
            raise UserError(f"the instructions have {len(system)} characters; at most {MAX_SYSTEM_CHARS} are taken")
        if any(conversation.system != system.strip() for conversation in conversations):
            conversations = self.begin(system)
        return [_say(conversation, "user", question.strip()) for conversation in conversations]

    def answer(
        self, conversations: Conversations, sampling: Sampling, session: str
    ) -> Iterator[tuple[Conversations, list[str]]]:
        """The conversations as their answers grow, and what is wrong with each, if anything.

        All voices speak at once. `stop` ends the answers; what had come of them stays.
        """
        stopped = self.stops[session] = Event()
        received, problems = [""] * len(self.voices), [""] * len(self.voices)
        ids: list[list[int]] = [[] for _ in self.voices]
        shown = 0.0
        try:
            with closing(self._speak(conversations, sampling, stopped, ids)) as pieces:
                for piece in pieces:
                    if isinstance(piece.text, UserError):
                        problems[piece.place] = str(piece.text)
                    else:
                        received[piece.place] += piece.text
                    if time.monotonic() - shown >= self.pause:
                        shown = time.monotonic()
                        yield [_answered(*each) for each in zip(conversations, received, ids, strict=True)], problems
        finally:
            self.stops.pop(session, None)
        answered = [_answered(*each) for each in zip(conversations, received, ids, strict=True)]
        yield [_settle(conversation) for conversation in answered], problems

    def _speak(
        self, conversations: Conversations, sampling: Sampling, stopped: Event, ids: list[list[int]]
    ) -> Generator["Piece", None, None]:
        """The pieces of all answers as they come; each voice has a thread, so that none waits for another."""
        pieces: Queue[Piece | None] = Queue()

        def speak(place: int) -> None:
            stream = conversations[place].stream_answer(
                self.voices[place].model, self.voices[place].tokenizer, sampling, ids=ids[place]
            )
            for text in _until(stopped, stream, self.voices[place].name):
                pieces.put(Piece(place, text))
            pieces.put(None)

        open_ones = [place for place, each in enumerate(conversations) if each.has_open_question()]
        threads = [Thread(target=speak, args=(place,), daemon=True) for place in open_ones]
        for thread in threads:
            thread.start()
        try:
            talking = len(threads)
            while talking:
                piece = pieces.get()
                if piece is None:
                    talking -= 1
                elif not stopped.is_set():
                    yield piece
        finally:
            stopped.set()
            for thread in threads:
                thread.join()

    def stop(self, session: str) -> None:
        """End the answers of a session, if there are any."""
        if session in self.stops:
            self.stops[session].set()

    def retry(self, conversations: Conversations) -> Conversations:
        """The conversations up to their last question."""
        again = [Conversation(each.system, list(each.messages)) for each in conversations]
        for conversation in again:
            conversation.forget_answer()
        return again

    def export(self, conversations: Conversations) -> str:
        """The conversations as lines that the training recipes read."""
        lines = [
            json.dumps({"model": voice.name, "messages": conversation.with_system()}, ensure_ascii=False) + "\n"
            for voice, conversation in zip(self.voices, conversations, strict=True)
            if conversation.messages
        ]
        return "".join(lines)

    def last_answer(self, conversations: Conversations, name: str) -> tuple[Voice, list[int], int]:
        """The voice of that name, the ids of its conversation, and where in them its last answer begins.

        Raises:
            UserError: it has not answered.
        """
        place = [voice.name for voice in self.voices].index(name)
        voice = self.voices[place]
        asked, answer = conversations[place].split_at_answer(voice.tokenizer)
        if not answer:
            raise UserError("there is no answer to inspect yet")
        return voice, asked + answer, len(asked)

    def inspect(self, conversations: Conversations, name: str) -> str:
        voice, ids, start = self.last_answer(conversations, name)
        return inspector.show_tokens(inspect_tokens(voice.model, voice.tokenizer, ids, start=start))

    def look_at_token(self, conversations: Conversations, name: str, place: int) -> str:
        """The lens at the token of that place in the last answer."""
        voice, ids, start = self.last_answer(conversations, name)
        position = start + max(0, min(place, len(ids) - start - 1))
        layers = inspect_layers(voice.model, voice.tokenizer, ids[: position + 1], start=position)
        return inspector.show_layers(layers)

    def look_at_answer(self, conversations: Conversations, name: str) -> str:
        voice, ids, start = self.last_answer(conversations, name)
        end = start + inspector.MAX_GRID_TOKENS + 1
        return inspector.show_grid(inspect_layers(voice.model, voice.tokenizer, ids[:end], start=start, top_k=1))


def _until(stopped: Event, stream: Generator[str, None, None], name: str) -> Iterator[str | UserError]:
    """The texts of a stream until it is stopped, and at the end what went wrong, if anything."""
    try:
        with closing(stream):
            for text in stream:
                yield text
                if stopped.is_set():
                    return
    except UserError as error:
        yield error
    except Exception:
        logger.exception("%s failed at an answer", name)
        yield UserError("the model failed at this answer; the log says how")


def _say(conversation: Conversation, role: str, content: Any) -> Conversation:
    """A copy with one more message; a question takes the place of one that has no answer."""
    said = Conversation(conversation.system, list(conversation.messages))
    if role == "user":
        said.forget_open_question()
    said.messages.append({"role": role, "content": content})
    return said


def _answered(question: Conversation, reply: str, ids: list[int]) -> Conversation:
    if not reply:
        return question
    answered = _say(question, "assistant", parse_reply(reply))
    answered.answer_ids = tuple(ids)
    return answered


def _settle(conversation: Conversation) -> Conversation:
    """Without an answer that has no text, which has no form as history."""
    last = conversation.messages[-1] if conversation.messages else None
    if last and last["role"] == "assistant" and not any(part["text"].strip() for part in last["content"]):
        return Conversation(conversation.system, conversation.messages[:-1])
    return conversation


def show_messages(conversation: Conversation, problem: str = "") -> list[dict[str, str]]:
    """A conversation as the page's chat shows it."""
    shown = []
    for message in conversation.messages:
        content = message["content"]
        text = as_html(show_parts(content)) if message["role"] == "assistant" else escape_all(content)
        shown.append({"role": message["role"], "content": text or "…"})
    if problem:
        shown.append({"role": "assistant", "content": f'<span class="refused">{escape_all(problem)}</span>'})
    return shown

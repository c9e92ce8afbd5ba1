"""How a conversation becomes ids, and which of them the model is trained to produce."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from chatmodel.runtime import UserError
from chatmodel.tokenizer import SPECIAL_TOKENS

Message = dict[str, Any]
Messages = list[Message]

# How a part of an assistant's message is marked, and whether it is trained: results come from the calculator.
PART_MARKS: dict[str, tuple[str, str, int]] = {
    "python": ("<|python_start|>", "<|python_end|>", 1),
    "python_output": ("<|output_start|>", "<|output_end|>", 0),
}
GREEN, GREY, RESET = "\033[92m", "\033[90m", "\033[0m"
LEGEND = f"{GREEN}green{RESET}: the model is trained to write it; {GREY}grey{RESET}: it only reads it"
SURROGATES = re.compile("[\ud800-\udfff]")  # JSON can hold them, UTF-8 cannot


@dataclass(frozen=True)
class Rendered:
    """Ids of a conversation; `mask` is 1 where the model is trained to produce the id, else 0; `cut` ids were left off
    its end."""

    input_ids: list[int]
    mask: list[int]
    cut: int = 0


class Piece(NamedTuple):
    """A stretch of text that is encoded by itself, or one control token."""

    text: str
    trained: int
    is_control: bool


def render_conversation(tokenizer: Any, messages: Messages, *, max_length: int | None = None) -> Rendered:
    """Ids and training mask of a conversation, cut at `max_length` ids.

    A system message is put in front of the first user message. Text is never read as control tokens.

    Raises:
        UserError: no messages, roles out of order, no assistant turn, empty content, an unknown part.

    Source: karpathy/nanochat nanochat/tokenizer.py@c75fe54, `render_conversation`; the ids and masks are the same.
    """
    return render_pieces(tokenizer, [lay_out(messages)], max_length=max_length)[0]


def render_prompt(tokenizer: Any, messages: Messages) -> list[int]:
    """Ids of a conversation that ends with the user, and `<|assistant_start|>`, for the model to go on.

    Raises:
        UserError: as `render_conversation`, or the last message is not the user's.
    """
    if messages and messages[-1].get("role") == "assistant":
        raise UserError("the last message is from the assistant; a prompt must end with a message from the user")
    pieces = [*lay_out(messages, for_training=False), Piece("<|assistant_start|>", 0, True)]
    return render_pieces(tokenizer, [pieces])[0].input_ids


def render_pieces(
    tokenizer: Any, conversations: Sequence[Sequence[Piece]], *, max_length: int | None = None
) -> list[Rendered]:
    """Encode laid-out conversations, all their text in one call, which the tokenizer spreads over the cores."""
    control_ids = _find_control_ids(tokenizer)
    texts = [piece.text for pieces in conversations for piece in pieces if not piece.is_control]
    encoded = iter(_encode_texts(tokenizer, texts))
    return [_assemble(pieces, control_ids, encoded, max_length) for pieces in conversations]


def _assemble(
    pieces: Sequence[Piece], control_ids: dict[str, int], encoded: Iterator[list[int]], max_length: int | None
) -> Rendered:
    input_ids: list[int] = []
    mask: list[int] = []
    for piece in pieces:
        ids = [control_ids[piece.text]] if piece.is_control else next(encoded)
        input_ids += ids
        mask += [piece.trained] * len(ids)
    if max_length is None or len(input_ids) <= max_length:
        return Rendered(input_ids, mask)
    return Rendered(input_ids[:max_length], mask[:max_length], cut=len(input_ids) - max_length)


def _encode_texts(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    # split_special_tokens: a user who types "<|assistant_end|>" gets its letters, not the control token.
    encoding = tokenizer(
        texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
    )
    return encoding["input_ids"]


def _find_control_ids(tokenizer: Any) -> dict[str, int]:
    added = tokenizer.get_added_vocab()
    missing = [token for token in SPECIAL_TOKENS if token not in added]
    if missing:
        raise UserError(
            f"the tokenizer has no special token {missing[0]}, which marks the turns of a conversation; "
            "use a tokenizer made by recipes/train_tokenizer.py"
        )
    return {token: added[token] for token in SPECIAL_TOKENS}


def lay_out(messages: Messages, *, for_training: bool = True) -> list[Piece]:
    """The control tokens and texts of a conversation in order; checks its form (see `render_conversation`)."""
    check_messages(messages, for_training=for_training)
    pieces = [Piece("<|bos|>", 0, True)]
    for message in _merge_system(messages):
        if message["role"] == "user":
            pieces += [Piece("<|user_start|>", 0, True), Piece(message["content"], 0, False)]
            pieces.append(Piece("<|user_end|>", 0, True))
        else:
            pieces.append(Piece("<|assistant_start|>", 0, True))
            pieces += _lay_out_reply(message["content"])
            pieces.append(Piece("<|assistant_end|>", 1, True))
    return pieces


def _merge_system(messages: Messages) -> Messages:
    if messages[0]["role"] != "system":
        return messages
    first = {"role": "user", "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
    return [first, *messages[2:]]


def _lay_out_reply(content: str | list[dict[str, str]]) -> Iterator[Piece]:
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        if part["type"] == "text":
            yield Piece(part["text"], 1, False)
        else:
            start, end, trained = PART_MARKS[part["type"]]
            yield from (Piece(start, trained, True), Piece(part["text"], trained, False), Piece(end, trained, True))


def check_messages(messages: Messages, *, for_training: bool = True) -> None:
    """Refuse what cannot be rendered, or (for training) teaches nothing.

    Raises:
        UserError: says which message is wrong and how, counting from 1.
    """
    if not isinstance(messages, list) or not messages:
        raise UserError("the conversation has no messages; give a list of {role, content}")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise UserError(f"message {number} is not of the form {{role, content}}, but {_shorten(message)}")
        _check_tools(number, message)
        _check_content(number, message)
    _check_order(messages)
    if for_training and not any(message["role"] == "assistant" for message in messages):
        raise UserError("the conversation has no assistant turn, so there is nothing to learn from it; add one")


def _check_order(messages: Messages) -> None:
    has_system = messages[0]["role"] == "system"
    if has_system and (len(messages) < 2 or messages[1]["role"] != "user"):
        raise UserError("the system message is not followed by a message from the user; add one")
    for turn, message in enumerate(messages[has_system:]):
        expected = "user" if turn % 2 == 0 else "assistant"
        if message["role"] != expected:
            raise UserError(
                f"message {turn + 1 + has_system} is from {_shorten(message['role'])} but should be from "
                f"'{expected}'; after an optional system message, user and assistant take turns"
            )


def _check_tools(number: int, message: Message) -> None:
    if message["role"] in ("tool", "function") or message.get("tool_calls"):
        used = _shorten(message.get("tool_calls") or message["content"])
        raise UserError(
            f"message {number} uses a tool ({used}), and the only one is the calculator: write its calls as parts of "
            "type 'python' and 'python_output' of a reply"
        )


def _check_content(number: int, message: Message) -> None:
    content = message["content"]
    if isinstance(content, list) and message["role"] == "assistant":
        for part in content:
            _check_part(number, part)
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise UserError(f"message {number} has content of type {type(content).__name__}; it must be text")
    if SURROGATES.search(content):
        raise UserError(f"message {number} has half of a character in it (a lone surrogate); remove it")
    if not content.strip():
        raise UserError(f"message {number} (from {_shorten(message['role'])}) is empty; remove it or fill it in")


def _check_part(number: int, part: Any) -> None:
    known = ("text", *PART_MARKS)
    if not isinstance(part, dict) or part.get("type") not in known:
        kind = part.get("type") if isinstance(part, dict) else part
        raise UserError(f"message {number} has a part of unknown type {_shorten(kind)}; known are {', '.join(known)}")
    if not isinstance(part.get("text"), str):
        raise UserError(f"message {number} has a part of type '{part['type']}' without a text; give its 'text'")


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def preview_masks(rendered: Rendered, tokenizer: Any) -> str:
    """The tokens of a conversation for a terminal: green where the model is trained to produce them, else grey."""
    marked = [
        f"{GREEN if trained else GREY}{tokenizer.decode([token_id])}{RESET}"
        for token_id, trained in zip(rendered.input_ids, rendered.mask, strict=True)
    ]
    return "|".join(marked)

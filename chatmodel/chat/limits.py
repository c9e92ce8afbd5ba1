"""What a server accepts: how much of everything, and which fields of a request mean what they say."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

TEXT_PARTS = ("text", "input_text", "output_text")
# A template of the client's own would go round every limit below.
REFUSED_FIELDS = ("chat_template_kwargs", "chat_template", "logit_bias")
# Of a generation config, which `transformers chat` sends with every question: what is within limits, and what says
# nothing. A client's end tokens could only make its own answer longer, up to the limit.
CONFIG_FACTS = ("transformers_version", "_from_model_config", "bos_token_id", "eos_token_id", "pad_token_id")
CONFIG_SETTINGS = ("max_new_tokens", "temperature", "top_p", "top_k", "do_sample", "repetition_penalty")
TEXT_FIELDS = ("model", "prompt", "suffix", "instructions", "user")
TOKEN_FIELDS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
MAX_STOPS, MAX_STOP_CHARS = 4, 64
MAX_SEED = 2**63 - 1


class RequestError(Exception):
    """A request that gets no answer, with its HTTP status and a sentence for the client."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Limits:
    """Upper bounds of one request, and of all at once; the first three are those of nanochat's server.

    An answer ends with the model's context, too, whatever a request asks for within `max_new_tokens`.
    """

    max_messages: int = 500
    max_message_chars: int = 8_000
    max_chars: int = 32_000
    max_new_tokens: int = 16_384
    max_temperature: float = 2.0
    max_parallel: int = 32
    max_body_bytes: int = 262_144
    body_seconds: float = 30.0


def refuse(message: str, status: int = 400) -> NoReturn:
    raise RequestError(status, message)


def read_json_object(body: bytes) -> dict[str, Any]:
    """The object a request's body holds.

    Raises:
        RequestError: it is no JSON object, or holds what no text or number may be.
    """
    try:
        value = json.loads(body.decode(), parse_constant=lambda name: refuse(f"{name} is no JSON number"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError, JSONDecodeError, a number of 5,000 digits
        refuse(f"the body is not valid JSON in UTF-8: {str(error)[:200]}")
    if not isinstance(value, dict):
        refuse("the body is not a JSON object")
    return value


def check_request(body: dict[str, Any], limits: Limits, *, knows_tools: bool) -> None:
    """Refuse a body that is over a limit, or asks for what it would not get.

    Args:
        knows_tools: whether the model's chat template shows `tools` to the model.

    Raises:
        RequestError: says what and why.
    """
    for name in REFUSED_FIELDS:
        if body.get(name) is not None:
            refuse(f"{name} is not taken from clients here; leave it out")
    for name in TEXT_FIELDS:
        if not isinstance(body.get(name, ""), str | None):
            refuse(f"{name} must be a text")
    _check_amount_of_text(body, limits)
    if "messages" in body:
        check_messages(body["messages"], limits, knows_tools=knows_tools)
    if not isinstance(body.get("input", ""), str):
        check_messages(body["input"], limits, knows_tools=knows_tools)
    _check_numbers(body, limits)
    _check_stops(body.get("stop"))
    _check_generation_config(body.get("generation_config"), limits)
    if not isinstance(body.get("tools", []), list | None):
        refuse("tools must be a list")
    if body.get("tools") and not knows_tools:
        refuse("this model calls no tools of a client's, only its own calculator; leave tools out")


def check_messages(messages: Any, limits: Limits, *, knows_tools: bool = False) -> None:
    """Messages of text, each with a role; their order is the chat template's business.

    Raises:
        RequestError: names the message, counting from 1.
    """
    if not isinstance(messages, list) or not messages:
        refuse("there are no messages; give a list of {role, content}")
    if len(messages) > limits.max_messages:
        refuse(f"there are {len(messages)} messages; at most {limits.max_messages} are read")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            refuse(f"message {number} is not of the form {{role, content}}")
        _check_calls(number, message.get("tool_calls"), knows_tools)
        length = sum(len(text) for text in _content_texts(number, message))
        if length > limits.max_message_chars:
            refuse(f"message {number} has {length} characters; at most {limits.max_message_chars} are read")


def _check_calls(number: int, calls: Any, knows_tools: bool) -> None:
    if calls is None:
        return
    if not knows_tools:
        refuse(f"message {number} has tool_calls, of which this model knows nothing")
    functions = [call.get("function") for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
    if not functions or not all(
        isinstance(each, dict) and isinstance(each.get("arguments"), str) for each in functions
    ):
        refuse(f"the tool_calls of message {number} are no list of {{function: {{name, arguments}}}}")


def _content_texts(number: int, message: dict[str, Any]) -> Iterator[str]:
    content = message.get("content")
    if isinstance(content, str):
        yield content
        return
    if content is None and message.get("tool_calls"):
        return
    if not isinstance(content, list):
        refuse(f"the content of message {number} is neither text nor a list of parts")
    for part in content:
        if not isinstance(part, dict) or part.get("type") not in TEXT_PARTS or not isinstance(part.get("text"), str):
            refuse(f"message {number} has a part that is not {{type: text, text: ...}}; only text is read")
        yield part["text"]


def _check_amount_of_text(body: dict[str, Any], limits: Limits) -> None:
    total = 0
    for text in _all_texts(body):
        total += len(text)
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            refuse("a text has half of a surrogate pair, which is no character")
    if total > limits.max_chars:
        refuse(f"the request has {total} characters of text; at most {limits.max_chars} are read")


def _all_texts(value: Any) -> Iterator[str]:
    """Every string in a JSON value, keys as well; nesting is no deeper than the parser allowed."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, list):
            waiting += item
        elif isinstance(item, dict):
            waiting += [*item.keys(), *item.values()]


def _check_numbers(body: dict[str, Any], limits: Limits) -> None:
    for name in TOKEN_FIELDS:
        _check_range(body, name, 1, limits.max_new_tokens, whole=True)
    _check_range(body, "temperature", 0, limits.max_temperature)
    _check_range(body, "top_p", 1e-6, 1)
    _check_range(body, "seed", 0, MAX_SEED, whole=True)
    # The server of Transformers makes a repetition penalty of it, which has no meaning below 0.
    _check_range(body, "frequency_penalty", 0, 2)
    for name in ("n", "best_of"):
        if body.get(name) not in (None, 1) or body.get(name) is True:
            refuse(f"{name}={str(body[name])[:20]} answers were asked for; only one is given to a request")
    if body.get("stream") not in (None, True, False):
        refuse("stream must be true or false")


def _check_generation_config(text: Any, limits: Limits) -> None:
    """A JSON object in a text, as Transformers' own client sends it."""
    if text is None:
        return
    if not isinstance(text, str):
        refuse("generation_config must be a text that holds a JSON object")
    config = read_json_object(text.encode())
    for name, value in config.items():
        if name not in CONFIG_FACTS + CONFIG_SETTINGS and value is not None:
            refuse(f"{name[:40]} in generation_config is not taken from clients here; leave it out")
        if name.endswith("_id") and not _is_id(value, name):
            refuse(f"{name} in generation_config must be a token's id, or for the end a list of them")
    if not isinstance(config.get("transformers_version", ""), str | None):
        refuse("transformers_version in generation_config must be a text")
    _check_range(config, "max_new_tokens", 1, limits.max_new_tokens, whole=True)
    _check_range(config, "temperature", 0, limits.max_temperature)
    _check_range(config, "top_p", 1e-6, 1)
    _check_range(config, "top_k", 0, MAX_SEED, whole=True)
    _check_range(config, "repetition_penalty", 0.1, 10)
    if config.get("do_sample") not in (None, True, False):
        refuse("do_sample in generation_config must be true or false")


def _is_id(value: Any, name: str) -> bool:
    ids = value if name == "eos_token_id" and isinstance(value, list) else [value]
    return all(each is None or type(each) is int for each in ids)


def _check_range(body: dict[str, Any], name: str, least: float, most: float, *, whole: bool = False) -> None:
    value = body.get(name)
    if value is None:
        return
    is_number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if not (is_number and math.isfinite(value) and least <= value <= most):
        kind = "a whole number" if whole else "a number"
        refuse(f"{name}={str(value)[:40]} must be {kind} from {least:g} to {most:g}")


def _check_stops(stop: Any) -> None:
    stops = [stop] if isinstance(stop, str) else stop
    if stops is None:
        return
    if not isinstance(stops, list) or len(stops) > MAX_STOPS:
        refuse(f"stop must be a text or a list of at most {MAX_STOPS}")
    if not all(isinstance(text, str) and 0 < len(text) <= MAX_STOP_CHARS for text in stops):
        refuse(f"each text in stop must have 1 to {MAX_STOP_CHARS} characters")

"""How a model answers: batches of prompts at once, or one reply streamed piece by piece."""

import re
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from copy import deepcopy
from threading import Event, Thread
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteriaList, TextIteratorStreamer

from chatmodel.conversations.render import render_prompt
from chatmodel.decoding.engine import Progress, Request
from chatmodel.decoding.pool import find_engine
from chatmodel.decoding.sampling import Sampling
from chatmodel.decoding.weights import find_obstacle
from chatmodel.model.generation_gpt import check_prompt
from chatmodel.progress import ItemProgress
from chatmodel.runtime import UserError, warn_once
from chatmodel.tokenizer import SPECIAL_TOKENS

CALCULATOR_MARKS = re.compile(r"(<\|(?:python|output)_(?:start|end)\|>)")
LONGEST_MARK = max(len(token) for token in SPECIAL_TOKENS)


def build_generation_config(
    tokenizer: Any, *, max_new_tokens: int, temperature: float = 0.0, top_k: int | None = None
) -> GenerationConfig:
    """Sampling settings; temperature 0 is greedy. A reply ends with `<|assistant_end|>` or a new `<|bos|>`.

    Raises:
        UserError: a value no reply can be drawn with.
    """
    if temperature < 0:
        raise UserError(f"temperature={temperature} must be 0 (greedy) or more")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k={top_k} must be at least 1; leave it out to sample from all tokens")
    sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k or 0} if temperature > 0 else {}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.bos_token_id],
        pad_token_id=tokenizer.pad_token_id,
        **(sampling or {"do_sample": False}),
    )


def fit_new_tokens(model: Any, prompt_length: int, max_new_tokens: int) -> int:
    """How many new tokens may follow a prompt: `max_new_tokens`, or what the model's context has left.

    Raises:
        UserError: the prompt is empty, or leaves no room for an answer in `max_position_embeddings`.
    """
    if prompt_length == 0:
        raise UserError("the prompt is empty; start it with <|bos|>")
    context = getattr(model.config, "max_position_embeddings", None)
    if context is None:
        return max_new_tokens
    if prompt_length >= context:
        raise UserError(
            f"the prompt has {prompt_length} tokens, but the model's context holds {context}, the answer included; "
            "shorten the conversation or start a new one"
        )
    return min(max_new_tokens, context - prompt_length)


@torch.no_grad()
def generate_replies(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    num_samples: int = 1,
    batch_size: int = 16,
    seed: int | None = None,
    keep_end: bool = False,
    progress: str | None = None,
) -> list[list[list[int]]]:
    """`num_samples` replies to each prompt, as new token ids, without the end token unless `keep_end`.

    Our own models are decoded by `chatmodel.decoding`, `batch_size` replies side by side, each followed by the next as
    soon as it ends; others by `generate`, batch by batch. The order of the result is the prompts'. A reply ends where
    the model's context does, whatever `max_new_tokens` says (with `generate` where its batch's longest row fills it).

    Args:
        seed: makes sampling repeatable, whatever was drawn before.
        progress: a label for a progress bar.
    """
    settings = build_generation_config(tokenizer, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k)
    for prompt in prompts:
        fit_new_tokens(model, len(prompt), max_new_tokens)  # refused before any work is done
    if seed is not None:
        torch.manual_seed(seed)
    was_training = model.training
    model.eval()
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    rows = [index for index in order for _ in range(num_samples)]
    generate = _generate_by_engine if has_engine(model) else _generate_by_batches
    found: list[list[int]] = [[] for _ in rows]
    with ItemProgress(progress or "replies", unit="reply", total=len(rows), shown=progress is not None) as bar:
        for place, reply in generate(model, [prompts[index] for index in rows], settings, batch_size):
            found[place] = cut_at_end(reply, settings.eos_token_id, keep_end=keep_end)
            bar.update()
    model.train(was_training)
    replies: list[list[list[int]]] = [[] for _ in prompts]
    for index, reply in zip(rows, found, strict=True):
        replies[index].append(reply)
    return replies


def has_engine(model: Any) -> bool:
    """Whether our own engine can decode with a model; says once why not."""
    obstacle = find_obstacle(model)
    if obstacle is not None:
        warn_once("replies come from Transformers' own generate, which is slower: %s", obstacle)
    return obstacle is None


def _start_decoding(
    model: Any, prompts: Sequence[list[int]], settings: GenerationConfig, batch_size: int
) -> Generator[Progress, None, None]:
    for prompt in prompts:
        check_prompt(model.config, torch.tensor([prompt]))
    seeds = torch.randint(2**62, (len(prompts),)).tolist() if settings.do_sample else [0] * len(prompts)
    requests = [
        Request(prompt, fit_new_tokens(model, len(prompt), settings.max_new_tokens), seed)
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    sampling = Sampling(settings.temperature, settings.top_k or None) if settings.do_sample else Sampling()
    return find_engine(model).decode(requests, sampling, end_ids=settings.eos_token_id, rows=batch_size)


def _generate_by_engine(
    model: Any, prompts: Sequence[list[int]], settings: GenerationConfig, batch_size: int
) -> Iterator[tuple[int, list[int]]]:
    replies: list[list[int]] = [[] for _ in prompts]
    for progress in _start_decoding(model, prompts, settings, batch_size):
        replies[progress.index] += progress.ids
        if progress.done:
            yield progress.index, replies[progress.index]


def _generate_by_batches(
    model: Any, prompts: Sequence[list[int]], settings: GenerationConfig, batch_size: int
) -> Iterator[tuple[int, list[int]]]:
    for begin in range(0, len(prompts), batch_size):
        yield from enumerate(_generate_batch(model, list(prompts[begin : begin + batch_size]), settings), begin)


def _generate_batch(model: Any, prompts: list[list[int]], settings: GenerationConfig) -> list[list[int]]:
    width = max(len(prompt) for prompt in prompts)
    pad = settings.pad_token_id
    input_ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    settings = deepcopy(settings)
    settings.max_new_tokens = fit_new_tokens(model, width, settings.max_new_tokens)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    output = model.generate(input_ids=input_ids, attention_mask=mask, generation_config=settings)
    rows: list[list[int]] = output[:, width:].tolist()
    return rows


def cut_at_end(ids: list[int], end_ids: Sequence[int], *, keep_end: bool = False) -> list[int]:
    """The ids before the first end token, or up to and with it."""
    for position, token_id in enumerate(ids):
        if token_id in end_ids:
            return ids[: position + keep_end]
    return ids


def break_control_tokens(text: str) -> str:
    """Text with a space inside whatever spells a control token ("< |bos|>"), as the chat template does it."""
    for token in SPECIAL_TOKENS:
        text = text.replace(token, f"< {token[1:]}")
    return text


class ReplyStreamer(TextIteratorStreamer):  # type: ignore[misc]
    """Pieces of a reply, in which only a control token looks like one.

    A model may well spell "<|python_start|>" in letters, when a user asks it to: shown again as history, that would
    steer it.
    """

    def __init__(self, tokenizer: Any, end_ids: Sequence[int], ids: list[int] | None = None) -> None:
        super().__init__(tokenizer, skip_prompt=True)
        self.ids = [] if ids is None else ids
        self.marks = {tokenizer.convert_tokens_to_ids(token): token for token in SPECIAL_TOKENS}
        self.marks |= dict.fromkeys(end_ids, "")
        self.held = ""
        self.token_cache: list[int] = []
        self.print_len = 0

    def put(self, value: torch.Tensor) -> None:
        """Args: value, the prompt (1, T) at first, then new ids (1,)."""
        if self.next_tokens_are_prompt:
            super().put(value)
            return
        for token_id in value.flatten().tolist():
            self.ids.append(token_id)
            if token_id in self.marks:
                self.end_text()
                self.text_queue.put(self.marks[token_id])
            else:
                super().put(torch.tensor([token_id]))

    def end_text(self) -> None:
        """Let go of all text that waits for more tokens, before a control token or the end."""
        self.held += self.tokenizer.decode(self.token_cache)[self.print_len :]
        self.text_queue.put(break_control_tokens(self.held))
        self.token_cache, self.print_len, self.held = [], 0, ""

    def end(self) -> None:
        """Called by `generate` behind the last token."""
        self.end_text()
        self.next_tokens_are_prompt = True
        self.text_queue.put(self.stop_signal)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Pass text on, but for what may be the beginning of a control token's name."""
        text = self.held + text
        cut = text.rfind("<")
        if cut < 0 or len(text) - cut >= LONGEST_MARK:
            cut = len(text)
        self.held = text[cut:]
        self.text_queue.put(break_control_tokens(text[:cut]))


def split_marks(pieces: Iterable[str]) -> Iterator[str]:
    """Pieces of text with the calculator's four marks as pieces of their own."""
    for piece in pieces:
        yield from (part for part in CALCULATOR_MARKS.split(piece) if part)


def parse_reply(text: str) -> list[dict[str, str]]:
    """The parts of a reply (text, python, python_output), as `render_conversation` takes them back as history."""
    kinds = {"<|python_start|>": "python", "<|output_start|>": "python_output"}
    parts: list[dict[str, str]] = []
    kind = "text"
    for piece in split_marks([text]):
        if CALCULATOR_MARKS.fullmatch(piece):
            kind = kinds.get(piece, "text")
        else:
            parts.append({"type": kind, "text": piece})
    return parts


def mask_calculator_output(ids: Sequence[int], table: dict[str, Any]) -> list[int]:
    """1 for each id the model chose, 0 for those the calculator wrote, its two marks included.

    Args:
        table: `config.calculator`.
    """
    mask, inside = [], False
    for token_id in ids:
        inside = inside or token_id == table["output_start"]
        mask.append(0 if inside else 1)
        inside = inside and token_id != table["output_end"]
    return mask


def stream_reply(
    model: Any,
    tokenizer: Any,
    messages: list[dict[str, Any]],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int | None = None,
    ids: list[int] | None = None,
) -> Iterator[str]:
    """The reply to a conversation as pieces of text, as they are generated; calculator calls stay visible as marks.

    A mark is always a piece by itself. Letters that only spell one come with a space in them.

    Closing the iterator stops the generation, and so does an interrupt while it waits. A reply ends where the model's
    context does, whatever `max_new_tokens` says.

    Args:
        ids: gets the new ids as they come, the end token included.

    Raises:
        UserError: the conversation does not fit the model's context.
    """
    prompt = render_prompt(tokenizer, messages)
    settings = build_generation_config(tokenizer, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k)
    settings.max_new_tokens = fit_new_tokens(model, len(prompt), max_new_tokens)
    streamer = ReplyStreamer(tokenizer, settings.eos_token_id, ids)
    stream = _stream_by_engine if has_engine(model) else _stream_by_generate
    yield from filter(None, stream(model, prompt, settings, streamer))


def _stream_by_engine(
    model: Any, prompt: list[int], settings: GenerationConfig, streamer: ReplyStreamer
) -> Iterator[str]:
    streamer.next_tokens_are_prompt = False
    with closing(_start_decoding(model, [prompt], settings, 1)) as tokens:
        for progress in tokens:
            streamer.put(torch.tensor(progress.ids))
            while not streamer.text_queue.empty():
                yield streamer.text_queue.get()
    streamer.end()
    yield from streamer


def _stream_by_generate(
    model: Any, prompt: list[int], settings: GenerationConfig, streamer: ReplyStreamer
) -> Iterator[str]:
    """`generate` works in a thread of its own."""
    stopped = Event()
    failures: list[BaseException] = []

    def stop(input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), stopped.is_set(), device=input_ids.device)

    def work() -> None:
        try:
            input_ids = torch.tensor([prompt], device=model.device)
            model.generate(
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                generation_config=settings,
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([stop]),
            )
        except BaseException as error:
            failures.append(error)
            streamer.end()

    thread = Thread(target=work, daemon=True)
    thread.start()
    try:
        yield from streamer
    finally:
        # A thread that is still at work when Python exits would take the whole process down.
        stopped.set()
        thread.join()
    if failures:
        raise failures[0]

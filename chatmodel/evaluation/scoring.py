"""What do all evaluations share? Requests and scores, ranks, progress, prompts as ids, batches of similar lengths."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from chatmodel.runtime import UserError


class Request(NamedTuple):
    """A text from its first token on (any sequence of ids), and the index (at least 1) of the first token scored."""

    tokens: Any
    start: int


class Score(NamedTuple):
    """Mean nats per scored token (NaN where none is), and whether each of them was the likeliest."""

    mean_loss: float
    is_greedy: bool


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """No dropout, no gradients; the model's mode is restored afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def get_device(model: nn.Module) -> torch.device:
    """Where the model's weights lie."""
    return next(model.parameters()).device


def fits_context(model: Any, ids: Sequence[int]) -> bool:
    """Whether a prompt leaves room for an answer in the model's context."""
    context = getattr(model.config, "max_position_embeddings", None)
    return context is None or len(ids) < context


def find_hard_limit(model: Any) -> int | None:
    """The length beyond which a model fails: that of its table of learned positions; None where it has no table."""
    config = model.config
    if any(getattr(config, name, None) is not None for name in ("rope_parameters", "rope_theta")):
        return None
    return getattr(config, "max_position_embeddings", None)


def get_rank() -> tuple[int, int]:
    """(rank, world size) of this process."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def wait_for_ranks() -> None:
    """Go on when all ranks have come here."""
    if dist.is_initialized():
        dist.barrier()


def share_decisions(count: int, decide: Callable[[range], list[bool]], *, device: torch.device) -> list[bool]:
    """Whether each of `count` examples was answered rightly: every rank decides its part, and all get the whole."""
    rank, world_size = get_rank()
    right = torch.zeros(count, dtype=torch.int32, device=device)
    mine = range(rank, count, world_size)
    right[rank::world_size] = torch.tensor(decide(mine), dtype=torch.int32, device=device)
    if world_size > 1:
        dist.all_reduce(right)
    return [bool(value) for value in right.tolist()]


def get_start_token(tokenizer: Any) -> int:
    """The token that begins every text: BOS, or the end-of-text token where the tokenizer knows no BOS."""
    for token_id in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    raise UserError("the tokenizer has neither bos_token nor eos_token; set one in its tokenizer_config.json")


def encode_texts(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of each text after the start token; names of special tokens in a text stay text."""
    start = get_start_token(tokenizer)
    encoded = tokenizer(
        texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
    )
    return [[start, *ids] for ids in encoded["input_ids"]]


def plan_batches(lengths: Sequence[int], *, batch_tokens: int) -> list[list[int]]:
    """Indices of sequences grouped by length, longest first; padded, a group has at most `batch_tokens` tokens.

    A sequence longer than that is a group of its own.
    """
    batches: list[list[int]] = []
    room = 0
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True):
        if room == 0:
            batches.append([])
            room = max(1, batch_tokens // max(1, lengths[index]))
        batches[-1].append(index)
        room -= 1
    return batches


def pad_right(sequences: Sequence[Sequence[int]], *, device: torch.device) -> Tensor:
    """(B, T) ids; padding is id 0, which causal attention never lets an earlier position see."""
    width = max(len(sequence) for sequence in sequences)
    rows = [[*sequence, *([0] * (width - len(sequence)))] for sequence in sequences]
    return torch.tensor(rows, dtype=torch.long, device=device)

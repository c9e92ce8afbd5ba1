"""Which token comes next? Chosen on the device, each row by its own random numbers."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, the same for all rows of a call.

    Args:
        temperature: 0 is greedy.
        top_k: of so many likeliest tokens, all if None.
        top_p: of the likeliest that together have at least this probability.
        scored: whether log-probabilities are wanted with the tokens.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    scored: bool = False


def choose(logits: torch.Tensor, sampling: Sampling, uniform: torch.Tensor | None) -> torch.Tensor:
    """The next token of each row.

    Args:
        logits: (B, vocab_size) in fp32.
        uniform: (B,) in [0, 1), which decides what is drawn; greedy needs none.
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    assert uniform is not None
    scaled, ids = logits / sampling.temperature, None
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        scaled, ids = scaled.topk(sampling.top_k, dim=-1)
    elif sampling.top_p < 1:
        scaled, ids = scaled.sort(dim=-1, descending=True)
    sums = torch.softmax(scaled, dim=-1).cumsum(dim=-1)
    total = sums[:, -1]
    if sampling.top_p < 1:
        # The first place where the sum reaches top_p is the last that counts.
        last = (sums < sampling.top_p * total[:, None]).sum(dim=-1).clamp(max=sums.shape[-1] - 1)
        total = sums.gather(1, last[:, None])[:, 0]
    # The strict comparison passes over tokens without probability; rounding may put the number beyond the last sum.
    place = (sums <= (uniform * total)[:, None]).sum(dim=-1).clamp(max=sums.shape[-1] - 1)
    return place if ids is None else ids.gather(1, place[:, None])[:, 0]


def score(logits: torch.Tensor, sampling: Sampling, chosen: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (B,) of chosen tokens at the temperature, among all tokens whatever top_k and top_p are."""
    scaled = logits / sampling.temperature if sampling.temperature > 0 else logits
    return scaled.gather(1, chosen[:, None])[:, 0] - scaled.logsumexp(dim=-1)

"""How far do two models' logits lie apart on fixed prompts?"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from chatmodel.environment import describe_software
from chatmodel.runtime import UserError

DEFAULT_TOLERANCE = 1e-5
MAX_PROMPT_TOKENS = 512
RANDOM_TOKENS = 256
PROMPTS = (
    "The capital of France is",
    "In 1969, 2 astronauts walked on the Moon; 50 years later 12 people had done so.",
    "def add(left, right):\n    return left + right\n\n\nprint(add(2, 40))\n",
    "Größe, naïve café, Москва, 東京, 서울, 🙂: text that is not only ASCII.",
    "It was a bright cold day. " * 40,
)


@dataclass(frozen=True)
class Parity:
    """What a comparison found. `max_logit_error` is absolute; `logits_std` says how large logits are at all."""

    max_logit_error: float
    argmax_agreement: float
    positions: int
    logits_std: float

    def describe(self) -> str:
        """The comparison in a sentence."""
        return (
            f"On {self.positions} positions of fixed prompts the logits (standard deviation {self.logits_std:.3g}) "
            f"differ by at most {self.max_logit_error:.2g}; the likeliest token is the same at "
            f"{100 * self.argmax_agreement:.4g} % of them."
        )


def encode_prompts(tokenizer: Any, vocab_size: int, context: int) -> list[list[int]]:
    """The fixed prompts as ids, cut to the context, and one row of ids drawn from the whole vocabulary."""
    longest = min(context, MAX_PROMPT_TOKENS)
    rows = [tokenizer(text, truncation=True, max_length=longest)["input_ids"] for text in PROMPTS]
    draw = torch.Generator().manual_seed(0)
    rows.append(torch.randint(0, vocab_size, (min(longest, RANDOM_TOKENS),), generator=draw).tolist())
    return rows


def compare_logits(
    reference: Callable[[torch.Tensor], torch.Tensor],
    candidate: Callable[[torch.Tensor], torch.Tensor],
    prompts: Sequence[list[int]],
) -> Parity:
    """Compare two functions from ids (1, T) to logits (1, T, vocab_size)."""
    errors, agreeing, positions, squares, count, total = [], 0, 0, 0.0, 0, 0.0
    with torch.inference_mode():
        for prompt in prompts:
            ids = torch.tensor([prompt])
            expected, found = reference(ids).double(), candidate(ids).double()
            errors.append((expected - found).abs().max().item())
            agreeing += int((expected.argmax(-1) == found.argmax(-1)).sum())
            positions += len(prompt)
            total += expected.sum().item()
            squares += expected.square().sum().item()
            count += expected.numel()
    worst = math.nan if any(math.isnan(error) for error in errors) else max(errors)
    spread = math.sqrt(max(0.0, squares / count - (total / count) ** 2))
    return Parity(worst, agreeing / positions, positions, spread)


def logits_of(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """A Transformers model as the function that `compare_logits` takes."""
    return lambda ids: model(input_ids=ids, use_cache=False).logits


def require_parity(parity: Parity, tolerance: float, what: str) -> None:
    """Refuse a copy that is not the same model.

    Args:
        tolerance: largest difference of a logit; where the logits' standard deviation is above 1, largest share of
            it, since the rounding of fp32 grows with the logits.

    Raises:
        UserError: a logit differs by more, or is not a number.
    """
    limit = tolerance * max(1.0, parity.logits_std)
    if not parity.max_logit_error <= limit:
        raise UserError(
            f"{what} is not the same model: its logits (standard deviation {parity.logits_std:.3g}) differ by up to "
            f"{parity.max_logit_error:.3g}, more than {limit:.3g}; nothing was written (--tolerance accepts more)"
        )


def parity_record(parity: Parity | None, **facts: Any) -> dict[str, Any]:
    """What `parity.json` holds: `compared` tells whether there was anything to compare with."""
    found = {} if parity is None else asdict(parity) | {"dtype": "float32"}
    return facts | {"compared": parity is not None} | found | {"software": describe_software()}

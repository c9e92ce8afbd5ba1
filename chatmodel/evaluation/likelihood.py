"""How likely does a model find given continuations? Many at once, with logits only where they are needed."""

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from chatmodel.evaluation.batches import Limits, Part, Plan, plan_scoring
from chatmodel.evaluation.scoring import Request, Score, evaluation_mode, get_device
from chatmodel.evaluation.unpadded_attention import attending_unpadded
from chatmodel.runtime import logger

# Logits taken to fp32 at a time: 512 MiB.
CHUNK_LOGITS = 2**27
# Logits of a pass: 2 GiB in fp32.
PASS_LOGITS = 2**29
DEFAULT_VOCABULARY = 65_536

_SHARES_PREFIXES: "WeakKeyDictionary[nn.Module, bool]" = WeakKeyDictionary()


@dataclass(frozen=True)
class Pending:
    """Losses and hits of a plan's tokens, perhaps still being computed on a GPU, in the order of `owners`."""

    plan: Plan
    losses: list[Tensor]
    hits: list[Tensor]

    def collect(self) -> list[Score]:
        """The score of each request, in the order in which they were given; waits for the device."""
        if not self.losses:
            return []
        losses, hits = torch.cat(self.losses).cpu(), torch.cat(self.hits).cpu()
        parts = [part for batch in self.plan.batches for part in batch.parts]
        counts = [count for part in parts for count in part.counts]
        owners = [owner for part in parts for owner in part.owners]
        scores: dict[int, Score] = {}
        for owner, loss, hit in zip(owners, torch.split(losses, counts), torch.split(hits, counts), strict=True):
            scores[owner] = Score(loss.mean().item() if len(loss) else math.nan, bool(hit.all()))
        return [scores[number] for number in self.plan.numbers]


def score_requests(
    model: nn.Module,
    requests: Sequence[Request],
    *,
    batch_tokens: int,
    progress: "tqdm[Any] | None" = None,
    share: bool = True,
) -> list[Score]:
    """The score of each request, in order; `share` computes what requests begin with only once."""
    share = share and can_share_prefixes(model)
    plan = plan_for_model(model, requests, batch_tokens=batch_tokens, share=share)
    return launch_plan(model, plan, advance=None if progress is None else progress.update).collect()


def plan_for_model(model: nn.Module, requests: Sequence[Request], *, batch_tokens: int, share: bool) -> Plan:
    """`plan_scoring` with limits for a model's vocabulary."""
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None) or DEFAULT_VOCABULARY
    # Copies of caches take the memory of as many tokens, the model's own concatenation the same again.
    limits = Limits(tokens=batch_tokens, cached_tokens=2 * batch_tokens, logits=max(1, PASS_LOGITS // vocabulary))
    return plan_scoring(requests, limits=limits, share=share)


def launch_plan(model: nn.Module, plan: Plan, *, advance: Callable[[int], Any] | None = None) -> Pending:
    """Run a plan's batches; on a GPU nothing is waited for.

    Args:
        advance: is told how many distinct requests are done, or on their way.
    """
    device = get_device(model)

    def move(tensor: Tensor) -> Tensor:
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

    losses: list[Tensor] = []
    hits: list[Tensor] = []
    with evaluation_mode(model), attention_without_plans(device), attending_unpadded(model):
        for batch in plan.batches:
            cache = None if batch.beginnings is None else fill_cache(model, move(batch.beginnings))
            for part in batch.parts:
                for loss, hit in score_part(model, part.apply(move), cache):
                    losses.append(loss)
                    hits.append(hit)
                if advance is not None:
                    advance(len(part.owners))
    return Pending(plan, losses, hits)


def score_part(model: Any, part: Part, cache: Any) -> list[tuple[Tensor, Tensor]]:
    """(nats, whether it was the likeliest) of the part's scored tokens, some at a time."""
    past = {"use_cache": False}
    if cache is not None:
        assert part.parents is not None
        past = {"use_cache": True, "past_key_values": fork_cache(cache, part.parents)}
    # logits_to_keep is the one public way to the head's own logits (soft cap, scale and all) at chosen positions.
    logits = model(input_ids=part.ids, logits_to_keep=part.positions, **past).logits  # (R, K, V)
    size = max(1, CHUNK_LOGITS // logits.shape[-1])
    scored = []
    for begin in range(0, len(part.targets), size):
        span = slice(begin, begin + size)
        picked = logits[part.rows[span], part.columns[span]].float()  # (n, V)
        targets = part.targets[span]
        scored.append((F.cross_entropy(picked, targets, reduction="none"), picked.argmax(dim=-1) == targets))
    return scored


def fill_cache(model: Any, ids: Tensor) -> Any:
    """The cache behind (F, L) ids."""
    return model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values


def fork_cache(cache: Any, rows: Tensor) -> Any:
    """A cache of its own for each of `rows`, which number the rows of `cache`; that stays as it is."""
    forked = copy.copy(cache)
    forked.layers = []
    for layer in cache.layers:
        own = copy.copy(layer)
        # Some layers keep their states in containers, whose entries they replace.
        own.__dict__.update({k: v.copy() for k, v in vars(layer).items() if isinstance(v, list | dict)})
        forked.layers.append(own)
    forked.reorder_cache(rows)  # the one way to choose rows that layers of every kind know
    return forked


def attention_without_plans(device: torch.device) -> AbstractContextManager[Any]:
    """On CUDA leave out cuDNN's attention, which prepares each shape anew: here nearly every batch has its own."""
    if device.type != "cuda":
        return nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def can_share_prefixes(model: nn.Module) -> bool:
    """Whether continuing a copied cache gives the logits of whole texts; tried once for each model."""
    if model not in _SHARES_PREFIXES:
        reason = find_sharing_fault(model)
        if reason is not None:
            logger.warning("shared beginnings are computed for each request anew, which is slower: %s", reason)
        _SHARES_PREFIXES[model] = reason is None
    return _SHARES_PREFIXES[model]


def find_sharing_fault(model: Any) -> str | None:
    """Why a model's cache cannot be copied and continued, or None."""
    device = get_device(model)
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    if vocabulary is None:
        return f"{type(model).__name__} has no configuration that names its vocabulary"
    ids = torch.arange(24, device=device).remainder(vocabulary).view(2, 12)
    rows = torch.tensor([1, 0, 1], device=device)
    ends = ids[rows, 8:].roll(1, dims=0)
    try:
        with evaluation_mode(model), attending_unpadded(model):
            cache = fill_cache(model, ids[:, :8])
            again = [
                model(input_ids=ends, past_key_values=fork_cache(cache, rows), use_cache=True).logits.float()
                for _ in range(2)
            ]
            whole = model(input_ids=torch.cat([ids[rows, :8], ends], dim=1), use_cache=False).logits[:, 8:].float()
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        return f"its cache cannot be copied ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    is_rounded = torch.is_autocast_enabled(device.type) or next(model.parameters()).dtype != torch.float32
    allowed = (5e-2 if is_rounded else 1e-4) * max(1.0, whole.abs().max().item())
    differ = max((logits - whole).abs().max().item() for logits in again)
    return None if differ <= allowed else f"logits behind a copied cache differ by {differ:.2g}"

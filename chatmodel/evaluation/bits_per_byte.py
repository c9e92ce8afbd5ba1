"""How well does a model compress text? Bits per byte, comparable between tokenizers."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from chatmodel.evaluation.scoring import evaluation_mode, get_device, get_rank, pad_right, plan_batches
from chatmodel.evaluation.statistics import convert_to_bits_per_byte
from chatmodel.runtime import UserError

# Rows of logits taken to fp32 at a time: at a vocabulary of 65,536 this is 1 GiB.
CHUNK_ROWS = 4096
# Documents that are sorted by length together.
CHUNK_DOCUMENTS = 1024


def bits_per_byte(model: nn.Module, batches: Iterable[Mapping[str, Tensor]], token_bytes: Tensor) -> float:
    """Mean code length of the targets in `batches`, over all ranks, in bits per byte.

    Args:
        batches: `input_ids` and `shift_labels`, both (B, T); a label is the token that follows, -100 is not scored.
            With `position_ids` (B, T), which restart at each document, the model attends within documents.
        token_bytes: (vocab_size,) bytes each token stands for; 0 for special tokens, which are not scored.

    Raises:
        UserError: nothing was scored.

    Source: karpathy/nanochat nanochat/loss_eval.py@c75fe54.
    """
    device = get_device(model)
    token_bytes = token_bytes.to(device)
    nats, n_bytes = 0.0, 0
    with evaluation_mode(model):
        for batch in batches:
            labels = batch["shift_labels"].to(device)
            given = {name: batch[name].to(device) for name in ("input_ids", "position_ids") if name in batch}
            more_nats, more_bytes = _score_batch(model, given, labels, token_bytes)
            nats, n_bytes = nats + more_nats, n_bytes + more_bytes
    return _divide(nats, n_bytes, device=device)


def document_bits_per_byte(
    model: nn.Module,
    documents: Iterable[Sequence[int]],
    token_bytes: Tensor,
    *,
    bos_token_id: int,
    max_tokens: int,
    batch_tokens: int = 16384,
) -> float:
    """All nats over all bytes of documents that are scored each alone: independent of how rows are packed.

    Args:
        documents: token ids, with or without a leading `bos_token_id`; the ranks share them.
        max_tokens: length, with `bos_token_id`, at which a document is cut.
        batch_tokens: tokens in a padded batch.

    Raises:
        UserError: nothing was scored.
    """
    device = get_device(model)
    token_bytes = token_bytes.to(device)
    rank, world_size = get_rank()
    mine = islice(documents, rank, None, world_size)
    nats, n_bytes = 0.0, 0
    with evaluation_mode(model):
        while chunk := [_begin(document, bos_token_id)[:max_tokens] for document in islice(mine, CHUNK_DOCUMENTS)]:
            for batch in plan_batches([len(ids) for ids in chunk], batch_tokens=batch_tokens):
                ids = pad_right([chunk[index] for index in batch], device=device)
                lengths = torch.tensor([len(chunk[index]) for index in batch], device=device)[:, None]
                labels = ids[:, 1:].masked_fill(torch.arange(1, ids.shape[1], device=device) >= lengths, -100)
                more_nats, more_bytes = _score_batch(model, {"input_ids": ids[:, :-1]}, labels, token_bytes)
                nats, n_bytes = nats + more_nats, n_bytes + more_bytes
    return _divide(nats, n_bytes, device=device)


def _begin(document: Sequence[int], bos_token_id: int) -> list[int]:
    ids = [int(token_id) for token_id in document]
    return ids if ids[:1] == [bos_token_id] else [bos_token_id, *ids]


def _score_batch(
    model: nn.Module, given: Mapping[str, Tensor], labels: Tensor, token_bytes: Tensor
) -> tuple[float, int]:
    """(nats, bytes) of the labels (B, T) that stand for bytes; the model is called with what is `given`."""
    sizes = torch.where(labels >= 0, token_bytes[labels.clamp(min=0)], 0)
    n_bytes = int(sizes.sum())
    if n_bytes == 0:
        return 0.0, 0
    logits = model(**given, use_cache=False).logits.flatten(0, 1)
    targets = labels.masked_fill(sizes == 0, -100).flatten()
    parts = zip(torch.split(logits, CHUNK_ROWS), torch.split(targets, CHUNK_ROWS), strict=True)
    sums = [F.cross_entropy(part.float(), target, reduction="sum") for part, target in parts]
    return math.fsum(torch.stack(sums).tolist()), n_bytes


def _divide(nats: float, n_bytes: int, *, device: torch.device) -> float:
    if dist.is_initialized():
        # MPS has no float64, but neither several ranks.
        total = torch.tensor([nats, float(n_bytes)], dtype=torch.float64, device=device)
        dist.all_reduce(total)
        nats, n_bytes = total[0].item(), int(total[1].item())
    if n_bytes == 0:
        raise UserError("no text was scored: the data gave only special or masked tokens, or no rows; give more text")
    return convert_to_bits_per_byte(nats, n_bytes)

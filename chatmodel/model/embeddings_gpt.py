"""Which tokens the given embeddings belong to, for a model that also looks values up by token."""

import torch
from torch.distributed.tensor import DTensor
from transformers.utils import logging

logger = logging.get_logger(__name__)

# So many channels tell the rows of a table apart; whether a row is the right one is then decided by all of them.
HASHED_CHANNELS = 16
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def find_tokens(embeddings: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The token of each embedding, by exact match with the rows of the embedding table.

    Args:
        embeddings: (B, T, hidden_size).
        table: (vocab_size, hidden_size); of equal rows the first counts.

    Returns:
        The ids (B, T), and (B, T) True where an embedding is no token's, as with learned prompts; the id there is any.
    """
    if isinstance(table, DTensor):
        table = table.full_tensor()
    table, embeddings = table.detach(), embeddings.detach().to(table.dtype)
    table_keys = _hash_rows(table)
    sorted_keys, order = table_keys.sort(stable=True)
    places = torch.searchsorted(sorted_keys, _hash_rows(embeddings)).clamp(max=len(order) - 1)
    ids = order[places]
    soft = (table[ids] != embeddings).any(dim=-1)
    if not torch.compiler.is_compiling() and soft.any():
        logger.warning_once(
            "Some of inputs_embeds are the embedding of no token (learned prompts, images, noise); "
            "they get no value embedding, which is looked up by token."
        )
    return ids, soft


def _hash_rows(rows: torch.Tensor) -> torch.Tensor:
    """A whole number for each row (..., channels), equal for equal rows; int64 overflow is part of it."""
    # + 0.0: a sum over devices turns -0.0 into 0.0
    bits = (rows[..., :HASHED_CHANNELS] + 0.0).contiguous().view(BITS[rows.element_size()]).long()
    weights = torch.arange(1, bits.shape[-1] + 1, device=rows.device) * 0x9E3779B97F4A7C1
    return (bits * weights).sum(dim=-1)

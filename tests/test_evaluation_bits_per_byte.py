"""Bits per byte against cases worked by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from chatmodel.evaluation.bits_per_byte import bits_per_byte, document_bits_per_byte
from chatmodel.runtime import UserError


class FixedModel(nn.Module):
    """P(next token) = 1/2, 1/4, 1/8, 1/8 for the tokens 0 to 3, whatever came before; counts its forward passes."""

    def __init__(self):
        super().__init__()
        self.log_probabilities = nn.Parameter(torch.tensor([1 / 2, 1 / 4, 1 / 8, 1 / 8]).log())
        self.shapes = []

    def forward(self, input_ids, use_cache):
        assert use_cache is False
        self.shapes.append(tuple(input_ids.shape))
        return SimpleNamespace(logits=self.log_probabilities.expand(*input_ids.shape, 4))


TOKEN_BYTES = torch.tensor([0, 1, 2, 3])  # token 0 is special


def rows(*labels):
    labels = torch.tensor(labels)
    return {"input_ids": torch.zeros_like(labels), "shift_labels": labels}


def test_bits_over_bytes():
    # Tokens 1, 2, 3 cost 2, 3, 3 bits and stand for 1, 2, 3 bytes; 0 and -100 count neither way.
    assert bits_per_byte(FixedModel(), [rows([1, 2, 3])], TOKEN_BYTES) == pytest.approx(8 / 6)
    batches = [rows([1, 0, -100], [2, 2, -100]), rows([3, 0, 0])]
    assert bits_per_byte(FixedModel(), batches, TOKEN_BYTES) == pytest.approx((2 + 3 + 3 + 3) / (1 + 2 + 2 + 3))


def test_a_batch_without_text_is_not_computed():
    model = FixedModel()
    assert bits_per_byte(model, [rows([0, -100]), rows([1, 1])], TOKEN_BYTES) == pytest.approx(2.0)
    assert model.shapes == [(1, 2)]


@pytest.mark.parametrize("batches", [[], [rows([0, 0]), rows([-100, -100])]])
def test_nothing_scored_is_an_error(batches):
    with pytest.raises(UserError, match="no text was scored"):
        bits_per_byte(FixedModel(), batches, TOKEN_BYTES)
    with pytest.raises(ValueError, match="no text was scored"):
        document_bits_per_byte(FixedModel(), [[0], []], TOKEN_BYTES, bos_token_id=0, max_tokens=8)


def test_documents_are_scored_alone_cut_and_weighed_by_bytes():
    # Cut at 3 tokens with BOS: 3 3 (6 bits, 6 bytes), 1 (2, 1), 2 1 (5, 3).
    documents = [[3, 3, 3, 3, 3], [1], [0, 2, 1, 1], []]
    measured = document_bits_per_byte(FixedModel(), documents, TOKEN_BYTES, bos_token_id=0, max_tokens=3)
    assert measured == pytest.approx((6 + 2 + 5) / (6 + 1 + 3))


@pytest.mark.parametrize("batch_tokens", [1, 8, 1000])
def test_documents_do_not_depend_on_the_batches(batch_tokens):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(4, 8), nn.Linear(8, 4))
    model.forward = lambda input_ids, use_cache: SimpleNamespace(logits=model[1](model[0](input_ids)))
    documents = [torch.randint(1, 4, (length,)).tolist() for length in (5, 1, 9, 3, 3)]
    nats = 0.0
    for document in documents:
        logits = model(input_ids=torch.tensor([0, *document[:-1]]), use_cache=False).logits
        nats += nn.functional.cross_entropy(logits, torch.tensor(document), reduction="sum").item()
    n_bytes = sum(TOKEN_BYTES[token].item() for document in documents for token in document)
    measured = document_bits_per_byte(
        model, documents, TOKEN_BYTES, bos_token_id=0, max_tokens=100, batch_tokens=batch_tokens
    )
    assert measured == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-6)


def test_ranks_add_up(monkeypatch):
    """Two ranks, one after the other: what each gives to the sum, and what it makes of the sum of both."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    given = []

    def measure(rank, total=None):
        def all_reduce(tensor):
            given.append(tensor.clone())
            tensor.copy_(tensor if total is None else total)

        monkeypatch.setattr(dist, "get_rank", lambda: rank)
        monkeypatch.setattr(dist, "all_reduce", all_reduce)
        bits_per_byte(FixedModel(), [[rows([1, 2, 3])], [rows([3, 3, 0])]][rank], TOKEN_BYTES)
        return document_bits_per_byte(FixedModel(), [[1], [2, 2], [3]], TOKEN_BYTES, bos_token_id=0, max_tokens=9)

    measure(0)
    measure(1)
    bits = [(nats.item() / math.log(2), n_bytes.item()) for nats, n_bytes in given]
    assert bits == [pytest.approx(pair) for pair in [(8, 6), (2 + 3, 1 + 3), (6, 6), (6, 4)]]
    assert measure(0, total=given[1] + given[3]) == pytest.approx((2 + 6 + 3) / (1 + 4 + 3))

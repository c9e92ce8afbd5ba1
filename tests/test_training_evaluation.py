"""What pretraining measures on the way: the validation text, with the context that the model is trained with."""

import math
from itertools import pairwise

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny_pretraining import build, make_run

LENGTH, TOKENS = 32, 64  # as `tiny_pretraining` has them


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("measured")
    text = folder / "shards"
    text.mkdir()
    for shard in range(2):
        sentences = [f"{number} is {'odd' if number % 2 else 'even and not odd'}." for number in range(500)]
        pq.write_table(pa.table({"text": sentences}), text / f"shard_{shard}.parquet")
    return make_run(folder / "run", tokenizer, text), text


def score_pieces(measurements, cuts):
    """Bits per byte of the first validation tokens, each piece between two `cuts` on its own."""
    store, sizes = measurements.store, measurements.token_bytes
    nats, num_bytes = 0.0, 0
    for start, stop in pairwise(cuts):
        ids = torch.from_numpy(store.tokens[start : stop + 1].astype("int64"))
        with measurements.train_step.evaluating() as model, torch.no_grad():
            probabilities = model(ids[None, :-1], use_cache=False).logits[0].double().log_softmax(-1)
        for probability, label in zip(probabilities, ids[1:].tolist(), strict=True):
            if sizes[label]:
                nats, num_bytes = nats - probability[label].item(), num_bytes + int(sizes[label])
    return nats / math.log(2) / num_bytes


@pytest.mark.parametrize("documents_apart", [False, True])
def test_text_is_measured_as_it_is_trained(prepared, documents_apart):
    run, text = prepared
    measurements = build(run, text, documents_apart=documents_apart).measurements
    with torch.no_grad():  # a fresh model's layers give 0, so that it matters to nobody what they see
        generator = torch.Generator().manual_seed(0)
        for parameter in measurements.train_step.model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    begun = [place for place in measurements.store.offsets.tolist() if place < TOKENS]
    assert len(begun) > 2, "the text measured shall hold borders"
    rows = list(range(0, TOKENS + 1, LENGTH))
    whole, apart = score_pieces(measurements, rows), score_pieces(measurements, sorted({*rows, *begun}))
    assert abs(whole - apart) > 1e-3
    assert measurements.validation_bpb() == pytest.approx(apart if documents_apart else whole, rel=1e-5)

"""What a token sees: packed documents, padding and windows, alike in every attention implementation."""

import pytest
import torch
from conftest import make_model

PLAIN = {"window_pattern": "L", "value_embeddings": False, "residual_scalars": False, "backout": False}
LENGTHS = (9, 3, 8)


def random_ids(*shape, seed=1):
    return torch.randint(0, 97, shape, generator=torch.Generator().manual_seed(seed))


def pack(lengths):
    """Position ids of documents laid end to end."""
    return torch.cat([torch.arange(length) for length in lengths])[None]


def as_trl_packs(ids, lengths):
    """What TRL 1.16 gives a model for packed rows (`padding_free`): sequence boundaries too, and no attention mask."""
    positions = pack(lengths)
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    return {
        "position_ids": positions,
        "labels": ids.masked_fill(positions == 0, -100),
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
        "seq_idx": torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int32), torch.tensor(lengths))[None],
        "use_cache": False,
    }


@pytest.fixture(autouse=True)
def _without_code_generation():
    """FlexAttention is compiled where it is called, for a minute; what it computes is the same without."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(params=["extras", "plain", "window of 3"])
def model(request):
    return make_model(**{"extras": {}, "plain": PLAIN, "window of 3": {"sliding_window": 3}}[request.param])


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("called", ["alone", "by TRL"])
def test_packed_documents_equal_documents_apart(model, attention, called):
    model.set_attn_implementation(attention)
    ids = random_ids(1, sum(LENGTHS))
    inputs = {"position_ids": pack(LENGTHS)} if called == "alone" else as_trl_packs(ids, LENGTHS)
    with torch.no_grad():
        packed = model(ids, **inputs).logits
        apart = torch.cat([model(document).logits for document in ids.split(LENGTHS, dim=1)], dim=1)
    assert packed.std() > 0.1
    torch.testing.assert_close(packed, apart, atol=1e-5, rtol=0)


def test_packed_loss_is_the_mean_over_all_documents(model):
    ids = random_ids(1, sum(LENGTHS))
    packed = model(ids, **as_trl_packs(ids, LENGTHS)).loss
    losses = [model(document, labels=document).loss * (document.shape[1] - 1) for document in ids.split(LENGTHS, 1)]
    torch.testing.assert_close(packed, sum(losses) / (sum(LENGTHS) - len(LENGTHS)))


@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
def test_implementations_agree(model, attention):
    """Padding as well: both sides longer than the windows, so that some rows may see nothing."""
    ids, mask = random_ids(3, 20), torch.ones(3, 20, dtype=torch.long)
    mask[1, :9] = 0
    mask[2, 11:] = 0
    with torch.no_grad():
        model.set_attn_implementation("eager")
        expected = model(ids, attention_mask=mask).logits
        model.set_attn_implementation(attention)
        found = model(ids, attention_mask=mask).logits
    assert expected.isfinite().all()
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


def test_implementations_agree_in_bf16(model):
    """To what 8 bits of mantissa leave: logits reach about 10 here."""
    model, ids = model.bfloat16(), random_ids(2, 20)
    with torch.no_grad():
        model.set_attn_implementation("eager")
        expected = model(ids).logits
        model.set_attn_implementation("sdpa")
        torch.testing.assert_close(model(ids).logits, expected, atol=0.25, rtol=0)


def test_left_padding_is_not_seen(model):
    ids = random_ids(1, 9)
    padded = torch.cat([random_ids(1, 8, seed=2), ids], dim=1)  # any ids: they must not matter
    mask = torch.cat([torch.zeros(1, 8, dtype=torch.long), torch.ones_like(ids)], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        found = model(padded, attention_mask=mask, position_ids=positions).logits[:, 8:]
        torch.testing.assert_close(found, model(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kept", [1, 3, torch.tensor([0, 4, 11])])
def test_only_the_logits_asked_for_are_made(model, kept):
    ids = random_ids(2, 12)
    with torch.no_grad():
        every = model(ids).logits
        found = model(ids, logits_to_keep=kept).logits
    torch.testing.assert_close(found, every[:, kept] if isinstance(kept, torch.Tensor) else every[:, -kept:])


def test_the_whole_model_is_one_graph():
    """`backend="eager"` traces without the minute of code generation: a break in the graph would raise."""
    model, ids = make_model(), random_ids(2, 12)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad(), torch.compiler.set_stance("default"):
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids).logits)

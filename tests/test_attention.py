"""Training-time attention: every path that works here is the textbook's, and the choice is made by trying."""

import pytest
import torch

from chatmodel.attention import (
    TRAINING_ATTENTION,
    AttentionShape,
    choose_attention,
    try_attention,
    use_attention,
)
from chatmodel.kernels import attention_products
from chatmodel.kernels.attention import attend_blocks, attend_dense, attend_documents_dense
from chatmodel.kernels.attention_products import attend_documents_products, attend_products, count_kept_shares

CPU = torch.device("cpu")


@pytest.fixture
def small_blocks(monkeypatch):
    """Rows of a few tokens are several blocks of queries."""
    monkeypatch.setattr(attention_products, "QUERIES", 6)


def attend_by_hand(query, key, value, scaling, window):
    """softmax(Q K^T) V in fp64, one query at a time."""
    output = torch.zeros_like(query)
    for position in range(query.shape[2]):
        first = 0 if window is None else max(0, position - window + 1)
        scores = (query[:, :, position, None] * key[:, :, first : position + 1]).sum(-1) * scaling
        output[:, :, position] = (scores.softmax(-1)[..., None] * value[:, :, first : position + 1]).sum(2)
    return output


@pytest.mark.parametrize("attend", [attend_dense, attend_blocks, attend_products])
@pytest.mark.parametrize(
    ("length", "window"), [(24, None), (24, 8), (23, 8), (23, 5), (9, 8), (8, 8), (17, 8), (5, 1)]
)
def test_sees_what_it_should(attend, length, window, small_blocks):
    torch.manual_seed(0)
    states = [torch.randn(2, 3, length, 4, dtype=torch.float64) for _ in range(3)]
    expected = attend_by_hand(*states, 0.3, window)
    torch.testing.assert_close(attend(*states, 0.3, window), expected)


@pytest.mark.parametrize("attend", [attend_documents_dense, attend_documents_products])
@pytest.mark.parametrize("window", [None, 5])
def test_documents_are_kept_apart(attend, window, small_blocks):
    """Two rows of 12: documents of 4 and 8, and of 7, 3 and 2, each as if it were alone."""
    torch.manual_seed(0)
    states = [torch.randn(2, 3, 12, 4, dtype=torch.float64) for _ in range(3)]
    starts = torch.tensor([0, 4, 12, 19, 22, 24, 24, 24], dtype=torch.int32)
    found = attend(*states, 0.3, window, starts)
    for row, begin, end in ((0, 0, 4), (0, 4, 12), (1, 0, 7), (1, 7, 10), (1, 10, 12)):
        alone = [part[row : row + 1, :, begin:end] for part in states]
        torch.testing.assert_close(found[row : row + 1, :, begin:end], attend_by_hand(*alone, 0.3, window))


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("starts", [None, [0, 4, 12, 19, 22, 24, 24, 24]])
def test_the_gradients_of_products_are_those_of_their_formula(window, starts, small_blocks):
    torch.manual_seed(0)
    states = [torch.randn(2, 3, 12, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    if starts is None:
        assert torch.autograd.gradcheck(lambda *s: attend_products(*s, 0.3, window), states, fast_mode=True)
    else:
        starts = torch.tensor(starts, dtype=torch.int32)
        assert torch.autograd.gradcheck(
            lambda *s: attend_documents_products(*s, 0.3, window, starts), states, fast_mode=True
        )


def test_products_in_bf16_are_as_exact_as_pytorchs_kernel():
    """Scores are not rounded to bf16: sharp ones would be wrong by several percent."""
    torch.manual_seed(0)
    exact = [torch.randn(2, 3, 300, 64) * size for size in (4, 1, 1)]
    gradient = torch.randn(2, 3, 300, 64)
    errors = {}
    expected = differentiate(attend_dense, exact, gradient)
    for attend in (attend_dense, attend_products):
        found = differentiate(attend, [part.bfloat16() for part in exact], gradient.bfloat16())
        errors[attend] = [(a.float() - b).norm() / b.norm() for a, b in zip(found, expected, strict=True)]
    for ours, theirs in zip(errors[attend_products], errors[attend_dense], strict=True):
        assert ours < 1.2 * theirs


def differentiate(attend, states, gradient):
    leaves = [part.clone().requires_grad_() for part in states]
    output = attend(*leaves, 0.125, 100)
    return output.detach(), *torch.autograd.grad(output, leaves, gradient)


@pytest.mark.parametrize("window", [None, 5, 50])
def test_what_products_keep_is_counted(window, small_blocks):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        attend_products(*(torch.randn(2, 3, 23, 4, requires_grad=True) for _ in range(3)), 0.3, window)
    assert sum(part.numel() for part in kept[3:]) == 2 * 3 * count_kept_shares(23, window)


def test_trials_of_kernels_that_keep_documents_apart():
    shape = AttentionShape(2, 2, 32, 8, 8, documents_apart=True)
    trials = {trial.name: trial for trial in try_attention(shape, CPU, torch.float32)}
    assert trials["sdpa"].milliseconds > 0
    assert trials["blocks"].reason == "does not keep documents apart"
    assert trials["products"].milliseconds > 0
    assert choose_attention([shape], CPU, torch.float32, compiled=False) == {8: "products"}
    assert choose_attention([shape], CPU, torch.float32, compiled=True) == {8: "sdpa"}


def test_trials_name_what_works_and_what_does_not():
    trials = {trial.name: trial for trial in try_attention(AttentionShape(2, 2, 32, 8, 8), CPU, torch.float32)}
    assert trials["sdpa"].milliseconds > 0
    assert trials["blocks"].milliseconds > 0
    assert trials["cudnn"].milliseconds is None
    assert "cuda" in trials["cudnn"].reason


def test_a_wrong_kernel_is_found_out(monkeypatch):
    from chatmodel import attention

    def attend_all(query, key, value, scaling, window):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=scaling)

    wrong = attention.Candidate("sees the future", attend_all)
    failing = attention.Candidate("fails", lambda *_: torch.zeros(1) / None)
    monkeypatch.setattr(attention, "CANDIDATES", (wrong, failing, *attention.CANDIDATES))
    trials = {t.name: t for t in attention.try_attention(AttentionShape(1, 2, 16, 8, 4), CPU, torch.float32)}
    assert trials["sees the future"].milliseconds is None
    assert "wrong" in trials["sees the future"].reason
    assert trials["fails"].reason.startswith("fails here: unsupported operand")


def test_the_choice_is_known_to_transformers():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    shapes = [AttentionShape(1, 2, 32, 8, 8), AttentionShape(1, 2, 32, 8, None)]
    names = choose_attention(shapes, CPU, torch.float32, compiled=False)
    assert names == {8: "products", None: "products"}
    chosen = use_attention(names | {8: "blocks"}, length=32, device=CPU)
    assert ALL_ATTENTION_FUNCTIONS[TRAINING_ATTENTION] is chosen
    states = torch.randn(1, 4, 32, 8)
    output, weights = chosen(None, states, states[:, :2], states[:, 2:], None, scaling=0.3, sliding_window=8)
    grouped = attend_dense(
        states, states[:, :2].repeat_interleave(2, 1), states[:, 2:].repeat_interleave(2, 1), 0.3, 8
    )
    torch.testing.assert_close(output, grouped.transpose(1, 2))
    assert weights is None

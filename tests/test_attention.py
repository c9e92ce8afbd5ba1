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
from chatmodel.kernels.attention import attend_blocks, attend_dense, attend_documents_dense

CPU = torch.device("cpu")


def attend_by_hand(query, key, value, scaling, window):
    """softmax(Q K^T) V in fp64, one query at a time."""
    output = torch.zeros_like(query)
    for position in range(query.shape[2]):
        first = 0 if window is None else max(0, position - window + 1)
        scores = (query[:, :, position, None] * key[:, :, first : position + 1]).sum(-1) * scaling
        output[:, :, position] = (scores.softmax(-1)[..., None] * value[:, :, first : position + 1]).sum(2)
    return output


@pytest.mark.parametrize("attend", [attend_dense, attend_blocks])
@pytest.mark.parametrize(
    ("length", "window"), [(24, None), (24, 8), (23, 8), (23, 5), (9, 8), (8, 8), (17, 8), (5, 1)]
)
def test_sees_what_it_should(attend, length, window):
    torch.manual_seed(0)
    states = [torch.randn(2, 3, length, 4, dtype=torch.float64) for _ in range(3)]
    expected = attend_by_hand(*states, 0.3, window)
    torch.testing.assert_close(attend(*states, 0.3, window), expected)


@pytest.mark.parametrize("window", [None, 5])
def test_documents_are_kept_apart(window):
    """Two rows of 12: documents of 4 and 8, and of 7, 3 and 2, each as if it were alone."""
    torch.manual_seed(0)
    states = [torch.randn(2, 3, 12, 4, dtype=torch.float64) for _ in range(3)]
    starts = torch.tensor([0, 4, 12, 19, 22, 24, 24, 24], dtype=torch.int32)
    found = attend_documents_dense(*states, 0.3, window, starts)
    for row, begin, end in ((0, 0, 4), (0, 4, 12), (1, 0, 7), (1, 7, 10), (1, 10, 12)):
        alone = [part[row : row + 1, :, begin:end] for part in states]
        torch.testing.assert_close(found[row : row + 1, :, begin:end], attend_by_hand(*alone, 0.3, window))


def test_trials_of_kernels_that_keep_documents_apart():
    shape = AttentionShape(2, 2, 32, 8, 8, documents_apart=True)
    trials = {trial.name: trial for trial in try_attention(shape, CPU, torch.float32)}
    assert trials["sdpa"].milliseconds > 0
    assert trials["blocks"].reason == "does not keep documents apart"
    assert choose_attention([shape], CPU, torch.float32, compiled=False) == {8: "sdpa"}


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
    assert names == {8: "sdpa", None: "sdpa"}
    chosen = use_attention(names | {8: "blocks"}, length=32, device=CPU)
    assert ALL_ATTENTION_FUNCTIONS[TRAINING_ATTENTION] is chosen
    states = torch.randn(1, 4, 32, 8)
    output, weights = chosen(None, states, states[:, :2], states[:, 2:], None, scaling=0.3, sliding_window=8)
    grouped = attend_dense(
        states, states[:, :2].repeat_interleave(2, 1), states[:, 2:].repeat_interleave(2, 1), 0.3, 8
    )
    torch.testing.assert_close(output, grouped.transpose(1, 2))
    assert weights is None

"""The largest batch is found in few trials, and never one that does not divide the step."""

from types import SimpleNamespace

import pytest
import torch

from chatmodel.runtime import UserError
from chatmodel.scaling import plan_run
from chatmodel.training.arguments import PretrainArguments
from chatmodel.training.batch_size import find_largest, list_candidates, try_rows


def plan(rows):
    return plan_run(2, vocab_size=512, head_dim=32, sequence_length=32, max_steps=1, total_batch_tokens=rows * 32)


def test_candidates_divide_the_step():
    assert list_candidates(plan(24), 1) == [1, 2, 4, 8]
    assert list_candidates(plan(24), 2) == [1, 2, 4]
    assert list_candidates(plan(24), 3) == [1, 2, 4, 8]
    with pytest.raises(UserError, match="24 rows of 32 tokens, which 5 processes"):
        list_candidates(plan(24), 5)


def test_sizes_are_not_tried_on_divided_weights():
    args = PretrainArguments(auto_batch=True)
    args.check_device(torch.device("cpu"), divided=False)
    with pytest.raises(UserError, match="auto_batch cannot try sizes on weights divided by FSDP"):
        args.check_device(torch.device("cpu"), divided=True)


@pytest.mark.parametrize("limit", [0, 1, 7, 8, 100])
@pytest.mark.parametrize("guess", [0, 1, 4, 1000])
def test_the_largest_that_fits_is_found_from_any_guess(limit, guess):
    tried = []

    def fits(size):
        tried.append(size)
        return size <= limit

    candidates = [1, 2, 4, 8, 16, 32]
    assert find_largest(candidates, fits, guess=guess) == max((c for c in candidates if c <= limit), default=0)
    assert len(tried) == len(set(tried)), "each trial can take a minute"


def test_rows_are_tried_as_they_are_trained(monkeypatch):
    """With room for documents where they are kept apart: kernels need memory for each place."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    taken = []
    step = SimpleNamespace(
        accelerator=SimpleNamespace(device=torch.device("cpu")),
        model=SimpleNamespace(config=SimpleNamespace(vocab_size=512), parameters=lambda: iter(())),
        plan=plan(8),
        accumulate=taken.append,
        drop=lambda: None,
    )
    assert try_rows(step, 4)
    assert try_rows(step, 4, lambda rows: 2 * rows)
    whole, apart = taken
    assert whole.keys() == {"input_ids", "shift_labels"}
    assert apart["input_ids"].shape == apart["shift_labels"].shape == (4, 32)
    assert apart["document_starts"].tolist() == [0, 32, 64, 96, 128, 128, 128, 128, 128]


def test_a_good_guess_needs_two_trials():
    tried = []
    assert find_largest([1, 2, 4, 8, 16], lambda size: bool(tried.append(size)) or size <= 4, guess=5) == 4
    assert tried == [4, 8]

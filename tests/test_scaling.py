"""The dial: the seed's published numbers, the recipe's formulas worked by hand, and refused values."""

import json
import os
from dataclasses import replace

import pytest
import torch
from conftest import GOLDEN

from chatmodel import GPTForCausalLM
from chatmodel.runtime import UserError
from chatmodel.scaling import plan_run


def test_seed_recipe_has_the_numbers_of_the_seed_report():
    plan = plan_run(10, vocab_size=65_536, sequence_length=2048, recipe="seed")
    assert plan.parameters == 133_038_080
    assert f"{plan.flops_per_token:e}" == "7.038566e+08"
    assert plan.steps == 5075
    assert plan.total_batch_tokens == 524_288
    assert plan.train_tokens == 2_660_761_600
    assert f"{plan.total_flops:e}" == "1.872795e+18"
    assert plan.base_learning_rates == {"embedding": 0.2, "head": 0.004, "matrix": 0.02}
    assert plan.groups["embedding"].lr == pytest.approx(0.2 * (640 / 768) ** -0.5)
    assert plan.groups["head"].weight_decay == 0.0
    assert (plan.schedule.warmup_steps, plan.schedule.warmdown_steps) == (0, 1015)
    assert plan.schedule.final_lr_fraction == 0.0
    assert plan.grad_clip == 1.0


@pytest.mark.parametrize(("depth", "billions"), [(4, 0.14), (8, 0.50), (12, 1.32), (20, 5.22), (24, 8.76)])
def test_horizon_grows_with_depth(depth, billions):
    assert plan_run(depth, vocab_size=32_768).train_tokens / 1e9 == pytest.approx(billions, abs=0.005)


def test_depth_12_is_the_reference_point():
    """With the batch its rates were tuned with every factor is 1: rates as tuned, decay 0.28."""
    assert plan_run(12, vocab_size=32_768).total_batch_tokens == 2**17
    plan = plan_run(12, vocab_size=32_768, total_batch_tokens=2**19)
    assert plan.groups["matrix"].lr == pytest.approx(0.02)
    assert plan.groups["embedding"].lr == pytest.approx(0.3)
    assert plan.groups["matrix"].weight_decay == pytest.approx(0.28, rel=2e-3)


def test_a_shorter_horizon_takes_a_smaller_batch():
    plan = plan_run(12, vocab_size=32_768, train_tokens=100_000_000)
    assert plan.total_batch_tokens == 2**16  # 2^17 * (0.1 / 1.32)^0.383 = 2^15.57
    assert plan.groups["matrix"].lr == pytest.approx(0.02 / 8**0.3)


@pytest.mark.parametrize("recipe", ["chatmodel", "seed"])
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_parameter_count_is_the_models(recipe, depth):
    plan = plan_run(depth, vocab_size=101, sequence_length=32, recipe=recipe, head_dim=32)
    with torch.device("meta"):
        model = GPTForCausalLM(plan.model_config())
    assert sum(p.numel() for p in model.parameters()) == plan.parameters


def test_flops_count_windows():
    """Depth 2, width 128: 24 * 128^2 matrix weights + head 100 * 128, and 12 * 128 * (32 window + 128 full)."""
    plan = plan_run(2, vocab_size=100, sequence_length=128, window_pattern="S")
    assert plan.flops_per_token == 6 * (24 * 128**2 + 100 * 128) + 12 * 128 * (32 + 128)


@pytest.mark.parametrize(
    "wrong",
    [
        {"depth": 0},
        {"depth": -3},
        {"tokens_per_parameter": 0},
        {"tokens_per_parameter": -1.0},
        {"max_steps": 0},
        {"sequence_length": 0},
        {"total_batch_tokens": 100},
        {"recipe": "best"},
        {"train_tokens": 5},
        {"decay_fraction": -1.0},
        {"decay_fraction": float("inf")},
    ],
)
def test_impossible_values_are_refused_by_name(wrong):
    values = {"depth": 4, "vocab_size": 512, "sequence_length": 64, **wrong}
    with pytest.raises(UserError, match=next(iter(wrong))):
        plan_run(values.pop("depth"), **values)


def test_one_factor_is_on_every_decay_and_on_nothing_else():
    planned, more = (plan_run(4, vocab_size=512, decay_fraction=fraction) for fraction in (1.0, 3.0))
    for name, group in planned.groups.items():
        assert more.groups[name] == replace(group, weight_decay=pytest.approx(3 * group.weight_decay))
    assert replace(more, groups=planned.groups) == planned


def test_batch_must_divide():
    plan = plan_run(4, vocab_size=512, sequence_length=64, total_batch_tokens=64 * 12)
    assert plan.accumulation_steps(3, 2) == 2
    with pytest.raises(UserError, match="device_batch_size=5 does not divide the 12 rows"):
        plan.accumulation_steps(5, 1)


def test_rows_at_once_are_an_upper_bound():
    plan = plan_run(4, vocab_size=512, sequence_length=64, total_batch_tokens=64 * 12)
    assert [plan.fit_rows(asked, 1) for asked in (1, 3, 5, 11, 12, 32)] == [1, 3, 4, 6, 12, 12]
    assert plan.fit_rows(32, 12) == 1
    for world_size in (5, 24):
        with pytest.raises(UserError, match=f"12 rows of 64 tokens, which {world_size} processes cannot share evenly"):
            plan.fit_rows(32, world_size)
    with pytest.raises(UserError, match="device_batch_size=0"):
        plan.fit_rows(0, 1)


def test_plans_are_as_recorded():
    """A change of a formula must show in the diff of the golden file."""
    plans = {
        f"{r}-{d}": plan_run(d, vocab_size=32_768, recipe=r).as_dict() for r in ("chatmodel", "seed") for d in (4, 20)
    }
    path = GOLDEN / "plans.json"
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(plans, indent=1) + "\n")
    assert json.loads(json.dumps(plans)) == json.loads(path.read_text())

"""Rates and momentum of nanochat's mid-training, by its formulas, and through the Trainer."""

import pytest
from tiny_finetuning import build_trainer
from transformers import TrainerCallback

from chatmodel.finetuning.schedule import MomentumWarmup, rate_multiplier


def test_rates_stay_and_then_fall():
    rates = [rate_multiplier(step, 10, constant_fraction=0.8) for step in range(10)]
    assert rates == pytest.approx([1, 1, 1, 1, 1, 1, 1, 1, 1, 0.5])
    assert [rate_multiplier(step, 4, constant_fraction=0.0) for step in range(4)] == [1, 0.75, 0.5, 0.25]


class Watch(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        matrix, other = kwargs["optimizer"].param_groups[:2]
        self.seen.append((matrix["momentum"], other["lr"] / other["initial_lr"]))


def test_a_run_follows_them(tmp_path, tokenizer):
    watch = Watch()
    settings = {"constant_fraction": 0.5, "callbacks": [MomentumWarmup(4), watch], "max_steps": 6}
    build_trainer(tmp_path, tokenizer, **settings).train()
    momenta, rates = zip(*watch.seen, strict=True)
    assert momenta == pytest.approx([0.85, 0.875, 0.9, 0.925, 0.95, 0.95])
    assert rates == pytest.approx([1, 1, 1, 1, 2 / 3, 1 / 3])

"""How do rates, momentum and decay move over the steps?"""

import math

import torch

from chatmodel.scaling import SchedulePlan


def learning_rate_multiplier(step: int, schedule: SchedulePlan) -> float:
    """Factor on every learning rate at `step` (from 0): linear up, constant, linear down."""
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    left = schedule.steps - step
    if schedule.warmdown_steps == 0 or left >= schedule.warmdown_steps:
        return 1.0
    progress = left / schedule.warmdown_steps
    return progress + (1 - progress) * schedule.final_lr_fraction


def muon_momentum(step: int, schedule: SchedulePlan) -> float:
    """Momentum of the matrices at `step`: up in the beginning, down again during the warm-down."""
    into_warmdown = step - (schedule.steps - schedule.warmdown_steps)
    if step < schedule.momentum_warmup_steps:
        share = step / schedule.momentum_warmup_steps
        return (1 - share) * schedule.momentum_start + share * schedule.momentum_peak
    if into_warmdown >= 0 and schedule.warmdown_steps:
        share = into_warmdown / schedule.warmdown_steps
        return (1 - share) * schedule.momentum_peak + share * schedule.momentum_final
    return schedule.momentum_peak


def apply_schedule(optimizer: torch.optim.Optimizer, step: int, schedule: SchedulePlan) -> float:
    """Set rates, momentum and decay for `step`; returns the learning-rate multiplier."""
    multiplier = learning_rate_multiplier(step, schedule)
    decay = 0.5 * (1 + math.cos(math.pi * step / schedule.steps)) if schedule.cosine_decay else 1.0
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * multiplier
        if group["kind"] == "muon":
            group["momentum"] = muon_momentum(step, schedule)
            group["weight_decay"] = group["initial_weight_decay"] * decay
    return multiplier

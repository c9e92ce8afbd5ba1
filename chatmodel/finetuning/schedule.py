"""How do rates and momentum move while a model is fine-tuned, where a Trainer's own schedules do not say it?"""

from typing import Any

from transformers import TrainerCallback

MOMENTUM_START, MOMENTUM_PEAK = 0.85, 0.95


def rate_multiplier(step: int, steps: int, *, constant_fraction: float) -> float:
    """Factor on every learning rate at `step` (from 0): 1 for that share of the steps, then linearly down to 0.

    Source: karpathy/nanochat@c75fe54 scripts/mid_train.py, `get_lr_multiplier`, with 0.8; here progress is in steps.
    """
    return min(1.0, (1 - step / steps) / (1 - constant_fraction))


class MomentumWarmup(TrainerCallback):  # type: ignore[misc]
    """Raises Muon's momentum over the first steps, from where a resumed run stands.

    Source: karpathy/nanochat@c75fe54 scripts/mid_train.py, `get_muon_momentum`, with 300 steps.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer before each step."""
        share = min(state.global_step / self.steps, 1.0) if self.steps else 1.0
        for group in kwargs["optimizer"].param_groups:
            if group.get("kind") == "muon":
                group["momentum"] = (1 - share) * MOMENTUM_START + share * MOMENTUM_PEAK

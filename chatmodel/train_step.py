"""What happens in one step of pretraining, from micro-batches to moved weights."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from chatmodel.losses import LanguageModelLoss
from chatmodel.model import GPTForCausalLM
from chatmodel.optim import apply_schedule, build_optimizer
from chatmodel.scaling import RunPlan


@dataclass(frozen=True)
class StepResult:
    """What a step found, the same on every rank: mean loss in nats a token, norm of the gradient, rate multiplier.

    `updated` is False when the loss or the gradient of some rank was not finite: the weights are then untouched.
    """

    loss: float
    gradient_norm: float
    lr_multiplier: float
    updated: bool


class TrainStep:
    """The model and the optimizer of a run, and how they take one step together.

    A step is `accumulate` for each of `accumulation` micro-batches, then `finish`.
    """

    def __init__(
        self,
        model: GPTForCausalLM,
        plan: RunPlan,
        accelerator: Accelerator,
        *,
        device_batch_size: int,
        lr_fraction: float = 1.0,
        compile: bool | None = None,
    ) -> None:
        self.model, self.plan, self.accelerator = model, plan, accelerator
        self.accumulation = plan.accumulation_steps(device_batch_size, accelerator.num_processes)
        loss_module = LanguageModelLoss(model)
        optimizer = build_optimizer(
            model,
            plan.groups,
            lr_fraction=lr_fraction,
            orthogonalization=plan.orthogonalization,
            normalize_updates=plan.normalize_updates,
        )
        if compile or (compile is None and accelerator.device.type == "cuda"):
            loss_module.compile(dynamic=False)
        self.loss_module, self.optimizer = accelerator.prepare(loss_module, optimizer)
        self._losses: list[torch.Tensor] = []

    def accumulate(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Add the gradient of one micro-batch of `input_ids` and `shift_labels` (B, T); returns its loss."""
        last = len(self._losses) == self.accumulation - 1
        if last:
            loss = self.loss_module(**batch)
            self.accelerator.backward(loss / self.accumulation)
        else:
            with self.accelerator.no_sync(self.loss_module):
                loss = self.loss_module(**batch)
                self.accelerator.backward(loss / self.accumulation)
        self._losses.append(loss.detach())
        return self._losses[-1]

    def finish(self, step: int) -> StepResult:
        """Update the weights with what was accumulated, unless it is not finite; `step` counts from 0."""
        assert len(self._losses) == self.accumulation, (len(self._losses), self.accumulation)
        loss = float(self.accelerator.reduce(torch.stack(self._losses).mean(), "mean"))
        self._losses.clear()
        limit = math.inf if self.plan.grad_clip is None else self.plan.grad_clip
        norm = self.accelerator.clip_grad_norm_(self.loss_module.parameters(), limit)
        multiplier = apply_schedule(self.optimizer, step, self.plan.schedule)
        finite = math.isfinite(loss) and math.isfinite(float(norm))
        if finite:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(loss, float(norm), multiplier, finite)

    def drop(self) -> None:
        """Forget what was accumulated since the last step."""
        self._losses.clear()
        self.optimizer.zero_grad(set_to_none=True)

    @contextmanager
    def evaluating(self) -> Iterator[GPTForCausalLM]:
        """The model as evaluation wants it: no dropout, padding masks respected, the run's precision."""
        self.model.eval()
        try:
            with self.accelerator.autocast():
                yield self.model
        finally:
            self.model.train()

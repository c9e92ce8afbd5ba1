"""What guards a Trainer of any stage, and what it adds up over all its starts?"""

import time
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_callback import ExportableState

from chatmodel.checkpoint import seal_folder
from chatmodel.runtime import UserError, logger

# Of a Trainer's log: what a step did in SFT, RL and DPO, and how fast.
STEP_PARTS = {
    "loss": "loss {:.4f}",
    "reward": "reward {:.3f}",
    "completions/mean_length": "{:.0f} tokens each",
    "entropy": "entropy {:.2f}",
    "rewards/margins": "margin {:.3f}",
    "rewards/accuracies": "chosen the likelier {:.2f}",
    "grad_norm": "gradient {:.3g}",
}
SPEED_PARTS = {"tokens_per_second": "{:,.0f} tok/s", "rollout_tokens_per_second": "{:,.0f} sampled tok/s"}


def stage_callbacks() -> list[TrainerCallback]:
    """What every stage's Trainer is given."""
    return [StopOnBadGradient(), SealCheckpoints(), TrainingTotals(), StepLines()]


class StopOnBadGradient(TrainerCallback):  # type: ignore[misc]
    """Ends a Trainer's run before a gradient that is not finite reaches the weights."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer on every rank, before each update."""
        gradients = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
        if gradients and not torch.stack(torch._foreach_norm(gradients)).isfinite().all():
            raise UserError(
                f"the gradient is not finite at step {state.global_step + 1}; the weights are as they were before: "
                f"lower lr_fraction, or set mixed_precision to 'no', and start again from {args.output_dir}"
            )


class SealCheckpoints(TrainerCallback):  # type: ignore[misc]
    """Leaves a manifest in each checkpoint of a Trainer, by which damage is found before it is continued from."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer on every rank, behind each checkpoint."""
        PartialState().wait_for_everyone()  # each rank writes its own part
        if state.is_world_process_zero:
            seal_folder(Path(args.output_dir) / f"checkpoint-{state.global_step}")


class TrainingTotals(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Counts a Trainer's seconds over all its starts; its checkpoints keep them (`sum_up` reads them).

    The Trainer's own seconds and mean loss are those since the last start.
    """

    def __init__(self) -> None:
        self.earlier_seconds, self.earlier_steps = 0.0, 0
        self.began: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer once its checkpoint, if there is one, was read."""
        self.earlier_steps = state.global_step
        # A checkpoint of before there was this class has nothing of it, and the Trainer wants an entry when it saves.
        kept = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self.earlier_seconds = kept["attributes"]["seconds"]
        self.began = time.perf_counter()

    @property
    def seconds(self) -> float:
        """So far, without what was lost to an interruption."""
        return self.earlier_seconds + (0.0 if self.began is None else time.perf_counter() - self.began)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {}, "attributes": {"seconds": self.seconds}}


class StepLines(TrainerCallback):  # type: ignore[misc]
    """Tells of steps in lines like pretraining's; `tell_in_lines` takes Transformers' bar and dicts away."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer."""
        self.warm: tuple[int, float] | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer; the first step may compile and says nothing about the others."""
        self.warm = self.warm or (state.global_step, time.perf_counter())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Called by the Trainer, after steps and evaluations."""
        if not state.is_world_process_zero or not logs:
            return
        if "eval_loss" in logs and "eval_bits_per_byte" not in logs:  # which says so itself (chatmodel.finetuning)
            logger.info("step %d | validation loss %.4f", state.global_step, logs["eval_loss"])
        if "loss" not in logs:
            return
        parts = [f"step {state.global_step}/{state.max_steps}"]
        told = logs.keys() - {"loss"} if "reward" in logs else logs.keys()  # RL's loss is 0 but for rounding
        parts += [text.format(logs[key]) for key, text in STEP_PARTS.items() if key in told]
        initial = kwargs["optimizer"].param_groups[0].get("initial_lr")
        if initial and "learning_rate" in logs:
            parts.append(f"lr x{logs['learning_rate'] / initial:.2f}")
        parts += [text.format(logs[key]) for key, text in SPEED_PARTS.items() if key in logs]
        if self.warm is not None and state.global_step > self.warm[0]:
            seconds = (time.perf_counter() - self.warm[1]) / (state.global_step - self.warm[0])
            parts.append(f"{(state.max_steps - state.global_step) * seconds / 60:.1f} min left")
        logger.info("%s", " | ".join(parts))


def tell_in_lines(trainer: Any) -> None:
    """Leave it to `StepLines` to tell of steps."""
    for callback in (DEFAULT_PROGRESS_CALLBACK, PrinterCallback):
        trainer.remove_callback(callback)


def sum_up(trainer: Any, outcome: Any) -> dict[str, float | None]:
    """`train_seconds` and the mean `train_loss` of a finished training, interrupted or not.

    Args:
        trainer: with `stage_callbacks`. outcome: what its `train` returned.
    """
    totals = next(one for one in trainer.callback_handler.callbacks if isinstance(one, TrainingTotals))
    loss, steps, last = 0.0, 0, 0
    for entry in trainer.state.log_history:
        if "loss" in entry and entry["step"] <= totals.earlier_steps:  # the mean since the entry before
            loss, steps, last = loss + entry["loss"] * (entry["step"] - last), entry["step"], entry["step"]
    since = trainer.state.global_step - totals.earlier_steps
    loss, steps = loss + outcome.training_loss * since, steps + since
    seconds = totals.earlier_seconds + outcome.metrics["train_runtime"]
    return {"train_loss": loss / steps if steps else None, "train_seconds": seconds}

"""What must a run remember beyond weights and optimizer, so that it goes on as if it had never stopped?"""

import math
import random
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from chatmodel.training.sharding import gather_tensor

HISTORY_POINTS = 1_000  # of a longer run between half as many and as many are kept


@dataclass
class TrainState:
    """Where a run stands, and what it has measured so far; the same on every rank."""

    step: int = 0
    train_seconds: float = 0.0
    first_steps: int = 0  # of a process each, which compile
    first_step_seconds: float = 0.0  # of those, among `train_seconds`
    smooth_loss: float = 0.0
    device_batch_size: int = 0  # what the run was begun with, and on how many ranks
    world_size: int = 0
    history_stride: int = 1
    history: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    changed_settings: list[dict[str, Any]] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        """Plain values of all fields."""
        return {name: list(value) if isinstance(value, list) else value for name, value in vars(self).items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the values back."""
        vars(self).update(state)

    def note_changes(self, before: dict[str, Any], now: dict[str, Any]) -> str:
        """Record which settings are others from this step on; names them, if any."""
        changed = {key: [before[key], now[key]] for key in sorted(before.keys() & now) if before[key] != now[key]}
        if changed:
            self.changed_settings.append({"step": self.step, "changed": changed})
        return ", ".join(f"{key} {then} -> {value}" for key, (then, value) in changed.items())

    def add_loss(self, loss: float) -> None:
        """Count a step with its loss."""
        self.step += 1
        self.smooth_loss = 0.9 * self.smooth_loss + 0.1 * loss

    def count_first_step(self, *, since: float) -> None:
        """A process has taken its first step; `since` were the training seconds before it."""
        self.first_steps += 1
        self.first_step_seconds += self.train_seconds - since

    def tokens_per_second(self, batch_tokens: int) -> float:
        """Of the steps that did not compile, where there are such; a step has `batch_tokens`."""
        steps, seconds = self.step - self.first_steps, self.train_seconds - self.first_step_seconds
        if not steps:
            steps, seconds = self.step, self.train_seconds
        return steps * batch_tokens / seconds

    def debiased_loss(self) -> float:
        """The smoothed training loss, in nats a token, freed of its start at zero."""
        return self.smooth_loss / (1 - 0.9**self.step) if self.step else math.nan

    def add_record(self, record: dict[str, float], *, every: int, is_last: bool) -> None:
        """Keep a log line's values, of a long run evenly thinned out, so that its checkpoints stay small."""

        def is_kept(step: float) -> bool:
            return step == 1 or step % (every * self.history_stride) == 0

        if is_last or is_kept(record["step"]):
            self.history.append(record)
        if len(self.history) > HISTORY_POINTS:
            self.history_stride *= 2
            self.history = [record for record in self.history if is_kept(record["step"])]


class TrainingClock:
    """Counts the seconds of training proper: what comes between `lap` and `restart` does not count."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.restart()

    def restart(self) -> None:
        """Begin to count now."""
        self._began = time.perf_counter()

    def lap(self, *, drain: bool = True) -> float:
        """Seconds since the last `lap` or `restart`; with `drain`, what the device has still to do included."""
        if drain and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        began = self._began
        self.restart()
        return self._began - began


def capture_randomness(device: torch.device) -> dict[str, Any]:
    """The states of this rank's random number generators, as plain values and tensors."""
    name, keys, *rest = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_randomness(state: dict[str, Any], device: torch.device) -> None:
    """Set this rank's random number generators to captured states."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def copy_to_host(state: Any, device: torch.device, *, keep: bool = True) -> Any:
    """Plain values and tensors that later steps cannot change, tensors on the CPU and put together if divided.

    Args:
        keep: whether this rank needs the copy; the others only take part where tensors are divided, and get None.
    """
    copied = _copy_to_host(state, keep=keep)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return copied


def _copy_to_host(state: Any, *, keep: bool) -> Any:
    if isinstance(state, dict):
        copied = {key: _copy_to_host(value, keep=keep) for key, value in state.items()}
        return copied if keep else None
    if isinstance(state, list | tuple):
        values = [_copy_to_host(value, keep=keep) for value in state]
        return type(state)(values) if keep else None
    if not isinstance(state, torch.Tensor):
        return state if keep else None
    whole = gather_tensor(state)
    if not keep:
        return None
    # Pinned memory is filled ten times as fast, and PyTorch keeps it for the next checkpoint.
    copy = torch.empty(whole.shape, dtype=whole.dtype, pin_memory=whole.is_cuda)
    return copy.copy_(whole.detach(), non_blocking=True)

"""Which tasks of an evaluation were decided before it stopped? They are not decided again."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from chatmodel.evaluation.scoring import get_rank
from chatmodel.evaluation.statistics import pack_decisions, unpack_decisions
from chatmodel.runtime import UserError, logger, read_json, write_json

# Changes when decisions may: a file of an older number is not believed.
VERSION = 1


class KeptDecisions:
    """Right or wrong for each example of finished tasks, in a JSON file beside the result.

    The file holds for one model and its settings; another model's decisions are put aside. All ranks know what the
    first one has read, and only that one writes.
    """

    def __init__(self, path: Path | None, *, model_key: str = "") -> None:
        self.path, self.model_key = path, model_key
        self.tasks: dict[str, dict[str, Any]] = self._read() if path is not None else {}

    @classmethod
    def nowhere(cls) -> "KeptDecisions":
        """Keeps nothing."""
        return cls(None)

    def find(self, key: str) -> tuple[list[bool], float] | None:
        """A task's decisions and the seconds they took, if they were made with this key."""
        task = self.tasks.get(key)
        return None if task is None else (unpack_decisions(task["decisions"], task["n"]), task["seconds"])

    def keep(self, key: str, label: str, right: list[bool], seconds: float) -> None:
        """Write a finished task's decisions down."""
        self.tasks[key] = {
            "task": label,
            "n": len(right),
            "decisions": pack_decisions(right),
            "seconds": round(seconds, 3),
        }
        if self.path is not None and get_rank()[0] == 0:
            write_json(self.path, {"version": VERSION, "model": self.model_key, "tasks": self.tasks})

    def _read(self) -> dict[str, dict[str, Any]]:
        assert self.path is not None
        found = [self._read_file(self.path)] if get_rank()[0] == 0 else [None]
        if dist.is_initialized():
            dist.broadcast_object_list(found)
        return found[0] or {}

    def _read_file(self, path: Path) -> dict[str, dict[str, Any]]:
        if not path.exists():
            return {}
        try:
            kept = read_json(path)
            is_ours = kept["version"] == VERSION and kept["model"] == self.model_key
            tasks = dict(kept["tasks"])
        except (KeyError, TypeError, ValueError, UserError):
            logger.warning("%s is damaged, so all tasks are decided anew", path)
            return {}
        if not is_ours:
            logger.info("%s is of another model or other settings, so all tasks are decided anew", path)
            return {}
        return tasks


def hash_values(values: Any) -> str:
    """A hash of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


@torch.no_grad()
def model_key(model: nn.Module, tokenizer: Any, *settings: Any) -> str:
    """Tells models apart by every weight, their configuration and tokenizer, and what else decides."""
    sums = []
    for name, weight in model.state_dict().items():
        exact = weight.float() if weight.device.type == "mps" else weight.double()  # MPS has no float64
        sums.append([name, list(weight.shape), exact.sum().item(), exact.square().sum().item()])
    config = getattr(model, "config", None)
    described = config.to_json_string() if config is not None else type(model).__name__
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hash_values([sums, described, vocabulary, [str(setting) for setting in settings]])

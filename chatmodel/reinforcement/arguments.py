"""What can be asked of reinforcement learning beside TRL's own settings, and which of those cannot be had here?"""

import importlib.util
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chatmodel.posttraining import check_training
from chatmodel.problems import check_tasks
from chatmodel.reinforcement.reward_choice import find_rewards
from chatmodel.runtime import UserError, logger

MODES = ("default", "nanochat")
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")  # of TRL 1.16
# What karpathy/nanochat@c75fe54 scripts/chat_rl.py computes, in TRL's words.
NANOCHAT_SETTINGS: dict[str, Any] = {
    "loss_type": "bnpo",
    "scale_rewards": "none",
    "beta": 0.0,
    "num_iterations": 1,
    "max_grad_norm": 0.0,
    "shuffle_dataset": False,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "mask_truncated_completions": False,
    "entropy_coef": 0.0,
    "importance_sampling_level": "token",
    "top_entropy_quantile": 1.0,
}


@dataclass
class RewardArguments:
    """What to practise on, how fast, and how what comes of it is measured."""

    run_dir: Path = field(default=Path("runs/base"), metadata={"help": "The run folder."})
    task: str | None = field(default=None, metadata={"help": "GSM8K (the default), Arithmetic, LetterCounting ..."})
    rows: int | None = field(default=None, metadata={"help": "Problems to train on; by default all of the task."})
    mixture: list[Any] = field(default_factory=list, metadata={"help": "Several tasks in place of one, as in SFT."})
    rewards: list[str] = field(
        default_factory=lambda: ["task"], metadata={"help": "task (right or wrong), form, or my.py:function."}
    )
    mode: str = field(default="default", metadata={"help": "'nanochat' computes its gradient to the letter."})
    chatcore: Path | None = field(default=None, metadata={"help": "Folder of ChatCORE's data sets; else the Hub."})
    mixed_precision: str | None = field(default=None, metadata={"help": "'bf16' or 'no'; by default what is faster."})
    lr_fraction: float = field(default=0.05, metadata={"help": "Factor on pretraining's learning rates."})
    pass_examples: int = field(default=400, metadata={"help": "Held-out problems measured before and after."})
    pass_samples: int = field(default=16, metadata={"help": "Replies to each for pass@k, at temperature 1; 0: none."})
    pass_k: list[int] = field(default_factory=lambda: [1, 8], metadata={"help": "The k of pass@k."})
    rollout_batch_size: int = field(default=256, metadata={"help": "Completions generated at once."})

    def tasks(self) -> list[Any]:
        """What is practised on, as a mixture."""
        return self.mixture or [{"name": self.task or "GSM8K"} | ({} if self.rows is None else {"rows": self.rows})]

    def check(self, training: Any, asked: dict[str, Any]) -> None:
        """Refuse what cannot be, before anything is loaded, and give `training` what the mode stands for.

        Args:
            training: TRL's GRPOConfig.
            asked: the settings that a user gave.

        Raises:
            UserError: says which setting.
        """
        if self.mixture and (self.task or self.rows is not None):
            raise UserError("mixture and task (or rows) were both given; say in the mixture what to practise on")
        if self.rows is not None and self.rows < 1:
            raise UserError(f"rows={self.rows} must be at least 1; leave it out for all of the task")
        check_tasks(self.tasks())
        for name in ("lr_fraction", "pass_examples", "rollout_batch_size"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name}={getattr(self, name)} must be greater than 0")
        if self.pass_samples and not all(1 <= k <= self.pass_samples for k in self.pass_k):
            raise UserError(f"pass_k={self.pass_k} must lie between 1 and pass_samples={self.pass_samples}")
        self._check_rewards(training)
        apply_mode(training, self.mode, asked)
        check_training(training)
        check_objective(training)
        check_sampling(training)
        if self.mode == "default":
            warn_of_truncation(training)

    def _check_rewards(self, training: Any) -> None:
        count, weights = len(find_rewards(self.rewards)), training.reward_weights
        if self.mode == "nanochat" and self.rewards != ["task"]:
            raise UserError("mode=nanochat stands for rewards=['task']; drop one of them")
        if weights is not None and (len(weights) != count or not all(map(math.isfinite, weights))):
            raise UserError(f"reward_weights={weights} must be {count} finite numbers, one for each of {self.rewards}")


def apply_mode(training: Any, mode: str, asked: dict[str, Any]) -> None:
    """Give a GRPOConfig what a mode stands for; `asked` are the settings that a user gave.

    Raises:
        UserError: an unknown mode, or the user asked for something that the mode excludes.
    """
    if mode not in MODES:
        raise UserError(f"mode={mode!r} must be one of {', '.join(MODES)}")
    if mode == "default":
        return
    for key, value in NANOCHAT_SETTINGS.items():
        if key in asked and asked[key] != value:
            raise UserError(f"mode=nanochat stands for {key}={value}, but {key}={asked[key]} was asked for; drop one")
        setattr(training, key, value)


def check_objective(training: Any) -> None:
    """Refuse an objective that TRL does not have; it would say so at the first step only.

    Raises:
        UserError: says which setting.
    """
    if training.loss_type not in LOSS_TYPES:
        raise UserError(f"loss_type={training.loss_type!r} must be one of {', '.join(LOSS_TYPES)}")
    for name in ("beta", "epsilon"):
        if not getattr(training, name) >= 0:
            raise UserError(f"{name}={getattr(training, name)} must be 0 or more")
    if training.num_iterations < 1:
        raise UserError(f"num_iterations={training.num_iterations} must be at least 1")


def warn_of_truncation(training: Any) -> None:
    """Say what comes of drawing from fewer tokens than are trained."""
    if training.top_k or training.top_p < 1:
        logger.warning(
            "top_k=%s, top_p=%s: completions are drawn from the likeliest tokens, but the probabilities of all are "
            "trained. What flows to the others is never drawn, so nothing pushes it back: entropy rises, until little "
            "is right. top_k=0 with top_p=1 draws from all",
            training.top_k,
            training.top_p,
        )


def check_sampling(training: Any) -> None:
    """Refuse what the decoding engine does not know, and vLLM where it is not installed; check before any work.

    Raises:
        UserError: such a setting.
    """
    if training.use_vllm:
        if importlib.util.find_spec("vllm") is None:
            raise UserError("use_vllm is set, but vllm is not installed here; leave it out to use the own engine")
        logger.warning("completions come from vLLM, where the calculator stays silent; the own engine has it")
    if not 0 < training.temperature < math.inf:
        raise UserError(
            f"temperature={training.temperature} must be finite and greater than 0: equal completions teach nothing"
        )
    if training.top_k < 0:
        raise UserError(f"top_k={training.top_k} must be 0, which draws from all tokens, or more")
    if not 0 < training.top_p <= 1:
        raise UserError(f"top_p={training.top_p} must be greater than 0 and at most 1, which draws from all tokens")
    if (training.max_completion_length or 0) < 1:
        raise UserError(f"max_completion_length={training.max_completion_length} must be at least 1")
    plain = {"min_p": None, "repetition_penalty": 1.0, "generation_kwargs": None, "cache_implementation": None}
    plain |= {"use_transformers_continuous_batching": False}
    for key, value in plain.items():
        if not training.use_vllm and getattr(training, key) != value:
            raise UserError(f"{key} is not known to the decoding engine; leave it out, or set use_vllm")

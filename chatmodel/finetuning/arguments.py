"""What can be asked of mid-training and SFT beside TRL's own settings, and which of those cannot be had here?"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chatmodel.finetuning.trainer import LOSS_SCALES
from chatmodel.posttraining import check_training, describe_adapter
from chatmodel.runtime import UserError

STAGES = ("mid", "sft")
# "wrapped" cuts conversations where rows end, as nanochat's mid-training does.
KNOWN_VALUES = {
    "packing_strategy": ("bfd", "wrapped"),
    "loss_type": ("nll",),
    "label_smoothing_factor": (0,),
    "neftune_noise_alpha": (None,),
    "completion_only_loss": (None,),
    "assistant_only_loss": (False,),  # it is, unless train_on_prompts
    "padding_free": (False,),  # packing is
}


@dataclass
class ConversationArguments:
    """What to train on, how fast, and what to look at on the way."""

    run_dir: Path = field(default=Path("runs/base"), metadata={"help": "The run folder."})
    stage: str = field(default="sft", metadata={"help": "'mid' or 'sft': where the result goes."})
    mixture: list[Any] = field(default_factory=list, metadata={"help": "Data sets to train on (see the YAML files)."})
    validation_mixture: list[Any] = field(default_factory=list, metadata={"help": "Data sets to validate on."})
    chatcore: Path | None = field(default=None, metadata={"help": "Folder of ChatCORE's data sets; else the Hub."})
    conversations: Path | None = field(
        default=None, metadata={"help": "Folder of the files that the mixture's stand_ins name; else the Hub."}
    )
    train_on_prompts: bool = field(default=False, metadata={"help": "Train on all tokens, not the assistant's only."})
    skip_invalid: bool = field(default=False, metadata={"help": "Leave out conversations that cannot be rendered."})
    mixed_precision: str | None = field(default=None, metadata={"help": "'bf16' or 'no'; by default what is faster."})
    compile: bool | None = field(default=None, metadata={"help": "torch.compile; by default on a GPU."})
    cuda_graphs: bool | None = field(
        default=None, metadata={"help": "Replay micro-batches as CUDA graphs; by default where memory has room."}
    )
    lr_fraction: float = field(default=1.0, metadata={"help": "Factor on pretraining's learning rates."})
    constant_fraction: float | None = field(
        default=None, metadata={"help": "Share of the steps at full rates, which then fall linearly to 0."}
    )
    momentum_warmup_steps: int | None = field(
        default=None, metadata={"help": "Steps over which Muon's momentum rises from 0.85 to 0.95; else 0.95."}
    )
    loss_scale: str = field(
        default="tokens", metadata={"help": "'tokens': all count the same; 'nanochat': mean of micro-batches' means."}
    )
    lora_rank: int | None = field(default=None, metadata={"help": "Train a LoRA of this rank instead of all weights."})
    lora_scale: float = field(default=2.0, metadata={"help": "LoRA's alpha over its rank."})
    preview_masks: int = field(default=0, metadata={"help": "Print so many conversations, trained tokens in green."})
    chatcore_every: int | None = field(
        default=None, metadata={"help": "Ask a few ChatCORE questions every so many steps, at an evaluation."}
    )
    chatcore_examples: int = field(default=100, metadata={"help": "How many of each task, with --chatcore_every."})
    chatcore_tasks: list[str] | None = field(
        default=None,
        metadata={"help": "Of ChatCORE or generated, with --chatcore_every; by default the quick ones."},
    )

    def check(self, training: Any, *, context: int | None = None) -> None:
        """Refuse what cannot be or would be ignored, before anything is loaded.

        Args:
            training: TRL's SFTConfig.
            context: the positions that the model has, once it is known.

        Raises:
            UserError: says which setting.
        """
        if self.stage not in STAGES:
            raise UserError(f"stage={self.stage!r} must be 'mid' or 'sft'")
        if not self.lr_fraction > 0:
            raise UserError(f"lr_fraction={self.lr_fraction} must be greater than 0")
        self._check_loss_scale()
        if self.preview_masks < 0:
            raise UserError(f"preview_masks={self.preview_masks} must be 0 or more")
        if self.lora_rank is not None:
            describe_adapter(self.lora_rank, scale=self.lora_scale)
        if self.constant_fraction is not None and not 0 <= self.constant_fraction < 1:
            raise UserError(f"constant_fraction={self.constant_fraction} must be at least 0 and less than 1")
        if self.momentum_warmup_steps is not None and self.momentum_warmup_steps < 1:
            raise UserError(f"momentum_warmup_steps={self.momentum_warmup_steps} must be at least 1")
        check_training(training, evaluates=True)
        self._check_length(training, context)
        self._check_evaluation(training)
        for name, known in KNOWN_VALUES.items():
            value = getattr(training, name)
            if getattr(value, "value", value) not in known:
                raise UserError(
                    f"{name}={value!r} is TRL's, and this recipe knows {' and '.join(map(repr, known))} only"
                )

    def _check_loss_scale(self) -> None:
        if self.loss_scale not in LOSS_SCALES:
            raise UserError(f"loss_scale={self.loss_scale!r} must be one of {', '.join(LOSS_SCALES)}")
        if self.cuda_graphs and self.loss_scale != "tokens":
            raise UserError(f"cuda_graphs does not go with loss_scale={self.loss_scale!r}; leave one of them out")

    def _check_length(self, training: Any, context: int | None) -> None:
        if training.max_length is None or training.max_length < 1:
            raise UserError(f"max_length={training.max_length} must be at least 1")
        if context is not None and training.max_length > context:
            raise UserError(
                f"max_length={training.max_length} is more than the model's context of {context} tokens; lower it"
            )

    def _check_evaluation(self, training: Any) -> None:
        evaluates = getattr(training.eval_strategy, "value", training.eval_strategy) != "no"
        if evaluates and not self.validation_mixture:
            raise UserError(
                "eval_strategy asks for evaluations but validation_mixture is empty; list data sets in it, or set "
                "eval_strategy to 'no'"
            )
        if self.chatcore_every is None:
            return
        if not evaluates or self.chatcore_every % (training.eval_steps or 1):
            raise UserError(
                f"chatcore_every={self.chatcore_every} must be a multiple of eval_steps={training.eval_steps}, as "
                "tasks are asked at evaluations"
            )

"""What mid-training, SFT and RL share: the model a stage starts from, its optimizer, and how it is handed on."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import LoraConfig, PeftModel

from chatmodel.checkpoint import MANIFEST, find_damage, load_model, save_model_folder
from chatmodel.devices import choose_precision
from chatmodel.optim.groups import build_optimizer
from chatmodel.optim.optimizer import MuonAdamW
from chatmodel.runtime import UserError, logger, read_json, write_json
from chatmodel.scaling import GroupPlan
from chatmodel.tokenizer import calculator_table, load_tokenizer
from chatmodel.trainer_callbacks import tell_in_lines

ADAPTER_LR = 2e-3

SIZES = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
# Of the Trainer's optimizer, which is not used, and what has the say in its place.
UNREAD = {"learning_rate": "rates are pretraining's times lr_fraction, so set that"}
UNREAD |= dict.fromkeys(
    ("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim", "optim_args"),
    "the optimizer is pretraining's, without weight decay",
)


def check_training(training: Any, *, evaluates: bool = False) -> None:
    """Refuse what a Trainer cannot do, or would pass over in silence, before anything is loaded.

    Args:
        training: TRL's arguments of any stage.
        evaluates: whether the stage evaluates on the way.

    Raises:
        UserError: says which setting.
    """
    if not evaluates and getattr(training.eval_strategy, "value", training.eval_strategy) != "no":
        raise UserError("eval_strategy is not for this stage, which measures before and after; leave it out")
    for name in SIZES:
        if getattr(training, name) < 1:
            raise UserError(f"{name}={getattr(training, name)} must be at least 1")
    if training.max_steps == 0:
        raise UserError("max_steps=0 would train nothing; give at least 1, or leave it out for num_train_epochs")
    if training.max_steps < 0 and not training.num_train_epochs > 0:
        raise UserError(f"num_train_epochs={training.num_train_epochs} must be greater than 0")
    if getattr(training.save_strategy, "value", training.save_strategy) == "steps" and not training.save_steps > 0:
        raise UserError(f"save_steps={training.save_steps} must be greater than 0, or save_strategy 'no'")
    if training.seed < 0:
        raise UserError(f"seed={training.seed} must be 0 or more")
    if training.bf16 or training.fp16:
        raise UserError("bf16 and fp16 are not read; set mixed_precision to 'bf16' or 'no', or leave all of them out")
    _check_read(training)


def _check_read(training: Any) -> None:
    defaults = {field.name: field.default for field in fields(training)}
    for name, instead in UNREAD.items():
        value = getattr(training, name)
        if getattr(value, "value", value) != getattr(defaults[name], "value", defaults[name]):
            raise UserError(f"{name} is not read: {instead}; leave {name} out")


def load_stage_model(folder: Path) -> tuple[Any, Any]:
    """(model, tokenizer) of a finished stage, in fp32, with the calculator switched on."""
    tokenizer = load_tokenizer(folder)
    model = load_model(folder, dtype=torch.float32)
    model.config.calculator = calculator_table(tokenizer)
    return model, tokenizer


def describe_adapter(rank: int, *, scale: float) -> LoraConfig:
    """PEFT's description of a LoRA beside all matrices of the layers; `scale` is its alpha over its rank.

    PEFT finds these matrices by the model's type (`chatmodel.LORA_TARGETS`).

    Raises:
        UserError: a rank or scale that would not train.
    """
    if rank < 1:
        raise UserError(f"lora_rank={rank} must be at least 1; leave it out to train all weights")
    if not scale > 0:
        raise UserError(f"lora_scale={scale} must be greater than 0")
    return LoraConfig(r=rank, lora_alpha=scale * rank, task_type="CAUSAL_LM")


def save_adapter(trainer: Any, folder: Path, base_folder: Path) -> Any:
    """Write a Trainer's adapter to `folder`; returns the model of `base_folder` with it merged in, in fp32."""
    trainer.save_model(str(folder))
    return PeftModel.from_pretrained(load_stage_model(base_folder)[0], folder).merge_and_unload()


def build_stage_optimizer(model: Any, base_folder: Path, *, lr_fraction: float) -> MuonAdamW:
    """The optimizer that pretraining used, from `plan.json` in `base_folder`, with rates times `lr_fraction`.

    Nothing decays, as in nanochat's later stages. Adapters (LoRA) are trained by AdamW at `ADAPTER_LR * lr_fraction`.

    Raises:
        UserError: a fraction that would not train, or no plan.
    """
    if not lr_fraction > 0:
        raise UserError(f"lr_fraction={lr_fraction} must be greater than 0")
    plan = read_json(base_folder / "plan.json")
    groups = {name: GroupPlan(group["lr"], tuple(group["betas"])) for name, group in plan["groups"].items()}
    groups["adapter"] = GroupPlan(ADAPTER_LR, (0.9, 0.99))
    return build_optimizer(
        model,
        groups,
        lr_fraction=lr_fraction,
        orthogonalization=plan["orthogonalization"],
        normalize_updates=plan["normalize_updates"],
    )


class StageTraining:
    """Gives a Trainer it is mixed into pretraining's optimizer: Muon for the matrices, AdamW for the rest.

    It also ends at its last step when it is continued from there, where Transformers 5.23 takes one more.

    Args:
        plan_folder, lr_fraction: as in `build_stage_optimizer`; everything else goes to the Trainer.
    """

    model: Any
    state: Any
    control: Any
    optimizer: torch.optim.Optimizer | None

    def __init__(self, *args: Any, plan_folder: Path, lr_fraction: float, **kwargs: Any) -> None:
        self.plan_folder, self.lr_fraction = plan_folder, lr_fraction
        super().__init__(*args, **kwargs)
        tell_in_lines(self)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """What the Trainer calls once, before training."""
        if self.optimizer is None:
            self.optimizer = build_stage_optimizer(self.model, self.plan_folder, lr_fraction=self.lr_fraction)
        return self.optimizer

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)  # type: ignore[misc]


@contextmanager
def explain_memory(training: Any, *, other: str | None = None) -> Iterator[None]:
    """Turn a full device into one sentence about a Trainer's arguments, and an `other` that takes memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        size, accumulation = training.per_device_train_batch_size, training.gradient_accumulation_steps
        more = f"; or, if that was not it, lower {other}" if other else ""
        raise UserError(
            f"the memory of {training.device} is full with per_device_train_batch_size={size} "
            f"({str(error).split('. ')[0]}); set a smaller one, and gradient_accumulation_steps higher than "
            f"{accumulation} by as much, which trains the same{more}"
        ) from None


def fit_to_device(training: Any, precision: str | None) -> None:
    """Give a Trainer's arguments the precision this device is faster with, or the one asked for, and `use_device`.

    TRL turns bf16 on unless told otherwise, which slows down CPUs and cards without it.
    """
    chosen = choose_precision(training.device, precision)
    training.bf16, training.mixed_precision = chosen == "bf16", chosen
    use_device(training)


def use_device(training: Any) -> None:
    """Pin memory only for CUDA; and take one GPU where a process sees several, which TRL refuses to spread over."""
    training.dataloader_pin_memory = training.device.type == "cuda"
    if training.n_gpu > 1:
        logger.warning(
            "one of the %d GPUs is used; accelerate launch with as many processes uses all of them", training.n_gpu
        )
        training._n_gpu = 1


def save_stage_model(model: Any, tokenizer: Any, folder: Path, base_folder: Path, *, card: Sequence[str]) -> None:
    """Write a stage's complete model folder, and the plan with it for the stages to come."""
    save_model_folder(model, tokenizer, folder, card=card)
    write_json(folder / "plan.json", read_json(base_folder / "plan.json"))


def latest_trainer_checkpoint(folder: Path) -> str | None:
    """The newest whole `checkpoint-<step>` of a Trainer in `folder`; half-written ones are removed with a word.

    The Trainer writes `trainer_state.json` last of what it reads, so a checkpoint without it was cut short. One whose
    files are not as `SealCheckpoints` left them is renamed, so that the Trainer counts it no longer.
    """
    with PartialState().main_process_first():
        checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
        for path in reversed(checkpoints):
            if not (path / "trainer_state.json").exists() or not (path / "optimizer.pt").exists():
                logger.warning("checkpoint %s was cut short and is removed", path)
                shutil.rmtree(path)
                continue
            problem = find_damage(path) if (path / MANIFEST).exists() else None
            if problem is None:
                return str(path)
            aside = path.with_name(f"damaged-{path.name}")
            logger.warning("checkpoint %s is damaged (%s) and is passed over; it is now %s", path, problem, aside)
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
    return None


def pick_history(log: Sequence[dict[str, Any]], *keys: str) -> list[dict[str, float]]:
    """Entries of a Trainer's log that hold `keys[0]`, reduced to their step and `keys`; prefixes are dropped."""
    return [
        {"step": entry["step"]} | {key.rpartition("/")[2]: entry[key] for key in keys if key in entry}
        for entry in log
        if keys[0] in entry
    ]

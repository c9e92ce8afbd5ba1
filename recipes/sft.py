"""Train on conversations, mid-training and SFT alike: `accelerate launch recipes/sft.py --config .../sft.yaml`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model
from trl import SFTConfig, SFTTrainer

from chatmodel import LORA_TARGETS
from chatmodel.conversations.mixtures import load_mixture
from chatmodel.conversations.render import Rendered, preview_masks
from chatmodel.evaluation.bits_per_byte import bits_per_byte
from chatmodel.posttraining import (
    PlannedOptimizer,
    SealCheckpoints,
    StopOnBadGradient,
    batch_rows,
    fit_to_device,
    latest_trainer_checkpoint,
    load_stage_model,
    pick_history,
    save_stage_model,
)
from chatmodel.runs import STAGE_INPUTS, Run
from chatmodel.runtime import UserError, entry_point, logger, parse_arguments, peak_memory_bytes
from chatmodel.tokenizer import token_byte_lengths


@dataclass
class ConversationArguments:
    """What can be asked beside TRL's own SFTConfig."""

    run_dir: Path = field(default=Path("runs/base"), metadata={"help": "The run folder."})
    stage: str = field(default="sft", metadata={"help": "'mid' or 'sft': where the result goes."})
    mixture: list[Any] = field(default_factory=list, metadata={"help": "Data sets to train on (see the YAML files)."})
    validation_mixture: list[Any] = field(default_factory=list, metadata={"help": "Data sets to validate on."})
    chatcore: Path | None = field(default=None, metadata={"help": "Folder of ChatCORE's data sets; else the Hub."})
    train_on_prompts: bool = field(default=False, metadata={"help": "Train on all tokens, not the assistant's only."})
    skip_invalid: bool = field(default=False, metadata={"help": "Leave out conversations that cannot be rendered."})
    mixed_precision: str | None = field(default=None, metadata={"help": "'bf16' or 'no'; by default what is faster."})
    lr_fraction: float = field(default=1.0, metadata={"help": "Factor on pretraining's learning rates."})
    lora_rank: int | None = field(default=None, metadata={"help": "Train a LoRA of this rank instead of all weights."})
    lora_scale: float = field(default=2.0, metadata={"help": "LoRA's alpha over its rank."})
    preview_masks: int = field(default=0, metadata={"help": "Print so many conversations, trained tokens in green."})


@dataclass
class ConversationConfig(SFTConfig):
    """TRL's SFTConfig with this project's defaults."""

    bf16: bool | None = field(default=False, metadata={"help": "Not read: see mixed_precision."})
    activation_checkpointing: bool | None = field(default=False, metadata={"help": "Trade speed for memory."})


class ConversationTrainer(PlannedOptimizer, SFTTrainer):
    """TRL's SFTTrainer with pretraining's optimizer."""


def load_datasets(
    args: ConversationArguments, training: ConversationConfig, tokenizer: Any
) -> tuple[Any, Any, list[Any]]:
    options = {
        "max_length": training.max_length,
        "seed": training.seed,
        "chatcore_folder": args.chatcore,
        "train_on_prompts": args.train_on_prompts,
        "skip_invalid": args.skip_invalid,
    }
    rows, counts = load_mixture(args.mixture, tokenizer, **options)
    for count in counts:
        logger.info("%(name)s: %(rows)d conversations, %(trained_tokens)d of %(tokens)d tokens trained", count)
    for row in rows.select(range(min(args.preview_masks, len(rows)))):
        mask = [int(label != -100) for label in row["labels"]]
        logger.info("%s", preview_masks(Rendered(row["input_ids"], mask), tokenizer))
    validation = None
    if args.validation_mixture:
        validation, _ = load_mixture(args.validation_mixture, tokenizer, split="validation", **options)
    return rows, validation, counts


def add_adapter(model: Any, args: ConversationArguments) -> Any:
    return get_peft_model(
        model,
        LoraConfig(
            r=args.lora_rank,
            lora_alpha=args.lora_scale * args.lora_rank,
            target_modules=LORA_TARGETS,
            task_type="CAUSAL_LM",
        ),
    )


def validation_bits_per_byte(model: Any, tokenizer: Any, rows: Any, training: ConversationConfig) -> float | None:
    if rows is None:
        return None
    batches = batch_rows(rows, pad_token_id=tokenizer.pad_token_id, batch_size=training.per_device_eval_batch_size)
    return bits_per_byte(model, batches, token_byte_lengths(tokenizer))


def main() -> None:
    args, training = parse_arguments(ConversationArguments, ConversationConfig)
    if args.stage not in ("mid", "sft"):
        raise UserError(f"stage={args.stage!r} must be 'mid' or 'sft'")
    run = Run(Path(args.run_dir))
    stage = run.begin(args.stage)
    if stage is None:
        return
    (source,) = STAGE_INPUTS[args.stage]
    model, tokenizer = load_stage_model(run.folder(source))
    rows, validation, counts = load_datasets(args, training, tokenizer)
    fit_to_device(training, args.mixed_precision)
    training.output_dir = str(run.checkpoints(args.stage))
    trainer = ConversationTrainer(
        model=add_adapter(model, args) if args.lora_rank else model,
        args=training,
        train_dataset=rows.select_columns(["input_ids", "labels"]),
        eval_dataset=None if validation is None else validation.select_columns(["input_ids", "labels"]),
        processing_class=tokenizer,
        callbacks=[StopOnBadGradient(), SealCheckpoints()],
        plan_folder=run.folder(source),
        lr_fraction=args.lr_fraction,
    )
    outcome = trainer.train(resume_from_checkpoint=latest_trainer_checkpoint(Path(training.output_dir)))
    if not trainer.is_world_process_zero():
        return
    if args.lora_rank:
        trainer.save_model(str(run.folder("adapters") / args.stage))
        model = trainer.model.merge_and_unload()
    model.eval()
    log = trainer.state.log_history
    losses, evaluations = pick_history(log, "loss"), pick_history(log, "eval_loss")
    evaluations = [{"step": entry["step"], "validation_loss": entry["eval_loss"]} for entry in evaluations]
    metrics = {
        "mixture": counts,
        "rows": len(rows),
        "steps": trainer.state.global_step,
        "train_loss": outcome.training_loss,
        "validation_loss": evaluations[-1]["validation_loss"] if evaluations else None,
        "validation_bpb": validation_bits_per_byte(model, tokenizer, validation, training),
        "history": losses,
        "evaluations": evaluations,
        "lora": bool(args.lora_rank),
        "lr_fraction": args.lr_fraction,
        "tokens_per_second": pick_history(log, "num_tokens")[-1]["num_tokens"] / outcome.metrics["train_runtime"],
        "train_seconds": outcome.metrics["train_runtime"],
        "peak_memory_bytes": peak_memory_bytes(training.device),
    }
    names = ", ".join(count["name"] for count in counts)
    card = [f"A chat model after {args.stage}: {len(rows):,} conversations of {names}."]
    save_stage_model(model, tokenizer, stage.folder, run.folder(source), card=card)
    stage.finish(metrics)


if __name__ == "__main__":
    entry_point(main)

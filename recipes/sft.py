"""Train on conversations, mid-training and SFT alike: `accelerate launch recipes/sft.py --config .../sft.yaml`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from peft import get_peft_model
from transformers import set_seed
from trl import SFTConfig, SFTTrainer

from chatmodel.arguments import parse_arguments
from chatmodel.conversations.mixtures import load_mixture, preview_mixture
from chatmodel.conversations.stand_ins import choose_sources
from chatmodel.devices import choose_precision
from chatmodel.finetuning.arguments import ConversationArguments
from chatmodel.finetuning.evaluation import TaskCheck, ValidationLoss
from chatmodel.finetuning.results import gather_metrics
from chatmodel.finetuning.rows import ConversationRows, StreamRows
from chatmodel.finetuning.schedule import MomentumWarmup
from chatmodel.finetuning.trainer import ConversationTraining
from chatmodel.gradients import check_graphs
from chatmodel.posttraining import (
    StageTraining,
    describe_adapter,
    explain_memory,
    fit_to_device,
    latest_trainer_checkpoint,
    load_stage_model,
    save_adapter,
    save_stage_model,
    use_device,
)
from chatmodel.runs import STAGE_INPUTS, Run
from chatmodel.runtime import entry_point, logger
from chatmodel.trainer_callbacks import stage_callbacks


@dataclass
class ConversationConfig(SFTConfig):
    """TRL's SFTConfig with this project's defaults."""

    bf16: bool | None = field(default=False, metadata={"help": "Not read: see mixed_precision."})
    activation_checkpointing: bool | None = field(default=False, metadata={"help": "Trade speed for memory."})


class ConversationTrainer(ConversationTraining, StageTraining, SFTTrainer):
    """TRL's SFTTrainer with pretraining's optimizer, layers and loss."""


class DividedTrainer(StageTraining, SFTTrainer):
    """TRL's SFTTrainer with pretraining's optimizer, for weights divided by FSDP."""


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
    folder = None if args.conversations is None else Path(args.conversations)
    validation = None
    if args.validation_mixture:  # first, as it is quick: what is wrong with it is known soon
        entries = choose_sources(args.validation_mixture, folder)
        validation, _ = load_mixture(entries, tokenizer, split="validation", **options)
    if folder is not None and not any(isinstance(entry, dict) and "stand_ins" in entry for entry in args.mixture):
        logger.warning("conversations=%s is not used, as no entry of the mixture lists stand_ins", folder)
    rows, counts = load_mixture(choose_sources(args.mixture, folder), tokenizer, **options)
    if args.preview_masks:
        for line in preview_mixture(rows, tokenizer, args.preview_masks):
            logger.info("%s", line)
    return rows, validation, counts


def build_trainer(
    args: ConversationArguments, training: ConversationConfig, model: Any, tokenizer: Any, data: tuple[Any, Any]
) -> Any:
    train, validation = data
    common = {
        "model": model,
        "args": training,
        "processing_class": tokenizer,
        "callbacks": stage_callbacks(),
        "plan_folder": Path(args.run_dir) / STAGE_INPUTS[args.stage][0],
        "lr_fraction": args.lr_fraction,
    }
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        logger.warning("weights divided by FSDP are trained the slow way: whole logits and masks, no loss per source")
        fit_to_device(training, args.mixed_precision)
        check_graphs(args.cuda_graphs, training.device, compiled=False, divided=True)
        columns = ["input_ids", "labels"]
        held_out = None if validation is None else validation.select_columns(columns)
        return DividedTrainer(train_dataset=train.select_columns(columns), eval_dataset=held_out, **common)
    compiled = training.device.type == "cuda" if args.compile is None else args.compile
    if compiled and (args.lora_rank or training.activation_checkpointing or training.gradient_checkpointing):
        logger.warning("adapters and activation checkpointing are trained without torch.compile, which is slower")
        compiled = False
    check_graphs(args.cuda_graphs, training.device, compiled=compiled, divided=False)
    precision = choose_precision(training.device, args.mixed_precision)
    use_device(training)
    shape = {"length": training.max_length, "pad_token_id": tokenizer.pad_token_id}
    tasks = {} if args.chatcore_tasks is None else {"tasks": args.chatcore_tasks}
    tasks = TaskCheck(args.chatcore_every, args.chatcore_examples, folder=args.chatcore, **tasks)
    tasks.check()
    if validation is not None:
        held_out = ConversationRows(validation, batch_size=training.per_device_eval_batch_size, **shape)
        validation = ValidationLoss(held_out, tokenizer)
    if args.momentum_warmup_steps is not None:
        common["callbacks"].append(MomentumWarmup(args.momentum_warmup_steps))
    size = training.per_device_train_batch_size
    if training.packing and training.packing_strategy == "wrapped":
        rows = StreamRows(train, length=training.max_length, batch_size=size)
    else:
        rows = ConversationRows(train, batch_size=size, packed=bool(training.packing), fixed=compiled, **shape)
    return ConversationTrainer(
        rows=rows,
        dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
        compiled=compiled,
        loss_scale=args.loss_scale,
        cuda_graphs=args.cuda_graphs,
        constant_fraction=args.constant_fraction,
        validation=validation,
        tasks=tasks,
        **common,
    )


def main() -> None:
    args, training = parse_arguments(ConversationArguments, ConversationConfig)
    args.check(training)
    run = Run(Path(args.run_dir))
    stage = run.begin(args.stage)
    if stage is None and not args.preview_masks:
        return
    source = run.folder(STAGE_INPUTS[args.stage][0])
    model, tokenizer = load_stage_model(source)
    args.check(training, context=model.config.max_position_embeddings)
    *data, counts = load_datasets(args, training, tokenizer)
    if stage is None:  # the preview is all that is left to do
        return
    if args.lora_rank:
        set_seed(training.seed)  # the Trainer does so too late for what is drawn here
        model = get_peft_model(model, describe_adapter(args.lora_rank, scale=args.lora_scale))
    training.output_dir = str(run.checkpoints(args.stage))
    trainer = build_trainer(args, training, model, tokenizer, data)
    with explain_memory(training):
        outcome = trainer.train(resume_from_checkpoint=latest_trainer_checkpoint(Path(training.output_dir)))
        if isinstance(trainer, ConversationTrainer):
            trainer.finish()
    metrics = gather_metrics(trainer, outcome, counts)
    if not trainer.is_world_process_zero():
        return
    if args.lora_rank:
        model = save_adapter(trainer, run.folder("adapters") / args.stage, source)
    names = ", ".join(count["name"] for count in counts)
    card = [f"A chat model after {args.stage}: {metrics['rows']:,} conversations of {names}."]
    save_stage_model(model.eval(), tokenizer, stage.folder, source, card=card)
    stage.finish(metrics | {"lora": bool(args.lora_rank), "lr_fraction": args.lr_fraction})


if __name__ == "__main__":
    entry_point(main)

"""Learn from preferred replies (DPO): `accelerate launch recipes/dpo.py --config .../dpo.yaml --preferences FILE`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from trl import DPOConfig, DPOTrainer

from chatmodel.arguments import parse_arguments
from chatmodel.devices import peak_memory_bytes
from chatmodel.posttraining import (
    StageTraining,
    check_training,
    describe_adapter,
    explain_memory,
    fit_to_device,
    latest_trainer_checkpoint,
    load_stage_model,
    pick_history,
    save_adapter,
    save_stage_model,
)
from chatmodel.preferences import (
    PairCollator,
    RenderedPairs,
    hold_out,
    measure_preferences,
    open_pairs,
    render_pairs,
    score_pairs,
)
from chatmodel.runs import Run
from chatmodel.runtime import UserError, entry_point, logger
from chatmodel.scaling import check_positive
from chatmodel.trainer_callbacks import stage_callbacks, sum_up

SOURCES = ("mid", "sft", "rl")
LOSS_TYPES = (  # of TRL 1.16
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
HISTORY = ("loss", "rewards/margins", "rewards/accuracies", "rewards/chosen", "rewards/rejected")


@dataclass
class PreferenceArguments:
    """What can be asked beside TRL's own DPOConfig."""

    run_dir: Path = field(default=Path("runs/base"), metadata={"help": "The run folder."})
    source: str = field(default="sft", metadata={"help": "The stage to begin with: mid, sft or rl."})
    preferences: str | None = field(
        default=None, metadata={"help": "Pairs: a file or folder, owner/name on the Hub, or a generated task."}
    )
    rows: int | None = field(default=None, metadata={"help": "At most so many pairs, after a shuffle."})
    held_out: int = field(default=200, metadata={"help": "Pairs to measure on, at most a fifth of all."})
    skip_invalid: bool = field(default=False, metadata={"help": "Leave out pairs that cannot be rendered."})
    mixed_precision: str | None = field(default=None, metadata={"help": "'bf16' or 'no'; by default what is faster."})
    lr_fraction: float = field(default=0.02, metadata={"help": "Factor on pretraining's learning rates."})
    lora_rank: int | None = field(default=None, metadata={"help": "Train a LoRA of this rank instead of all weights."})
    lora_scale: float = field(default=2.0, metadata={"help": "LoRA's alpha over its rank."})

    def check(self, training: Any) -> None:
        if self.source not in SOURCES:
            raise UserError(f"source={self.source!r} must be one of {', '.join(SOURCES)}")
        if self.preferences is None:
            raise UserError("no preferences are given; name a file with --preferences FILE")
        for name in ("rows", "held_out"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        check_positive(lr_fraction=self.lr_fraction, beta=training.beta)
        if (training.max_length or 0) < 1:
            raise UserError(f"max_length={training.max_length} must be at least 1: the tokens a conversation may have")
        for name in training.loss_type:
            if name not in LOSS_TYPES:
                raise UserError(f"loss_type={name!r} must be one of {', '.join(LOSS_TYPES)}")
        check_training(training)
        self.adapter()

    def adapter(self) -> Any:
        return None if self.lora_rank is None else describe_adapter(self.lora_rank, scale=self.lora_scale)


@dataclass
class PreferenceConfig(DPOConfig):
    """TRL's DPOConfig with this project's defaults."""

    bf16: bool | None = field(default=False, metadata={"help": "Not read: see mixed_precision."})
    activation_checkpointing: bool | None = field(default=False, metadata={"help": "Trade speed for memory."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "0: Muon and AdamW set the size of a step anyway."})


class PreferenceTrainer(RenderedPairs, StageTraining, DPOTrainer):
    """TRL's DPOTrainer with pretraining's optimizer and our rendering."""


def build_trainer(
    args: PreferenceArguments, training: PreferenceConfig, run: Run, model: Any, tokenizer: Any, pairs: Any
) -> PreferenceTrainer:
    fit_to_device(training, args.mixed_precision)
    training.output_dir = str(run.checkpoints("dpo"))
    # Without its adapter, or before it has learned, the model is its own reference.
    needs_reference = args.lora_rank is None and not training.precompute_ref_log_probs
    return PreferenceTrainer(
        model=model,
        # TRL would look for it under the name that the model was loaded from.
        ref_model=load_stage_model(run.folder(args.source))[0] if needs_reference else None,
        peft_config=args.adapter(),
        args=training,
        data_collator=PairCollator(tokenizer.pad_token_id),
        train_dataset=pairs,
        processing_class=tokenizer,
        callbacks=stage_callbacks(),
        plan_folder=run.folder(args.source),
        lr_fraction=args.lr_fraction,
    )


def score(trainer: PreferenceTrainer, rows: Any) -> Any:
    model, training = trainer.accelerator.unwrap_model(trainer.model), trainer.args
    with torch.autocast(training.device.type, torch.bfloat16, enabled=training.bf16):
        return score_pairs(
            model.eval(),
            rows,
            pad_token_id=trainer.processing_class.pad_token_id,
            batch_size=training.per_device_eval_batch_size,
        )


def main() -> None:
    args, training = parse_arguments(PreferenceArguments, PreferenceConfig)
    args.check(training)
    run = Run(Path(args.run_dir))
    stage = run.begin("dpo", inputs=(args.source,))
    if stage is None:
        return
    source = run.folder(args.source)
    model, tokenizer = load_stage_model(source)
    pairs = open_pairs(args.preferences, rows=args.rows, skip_invalid=args.skip_invalid)
    context = model.config.max_position_embeddings
    if training.max_length > context:
        raise UserError(f"max_length={training.max_length} is more than the model's context of {context}; lower it")
    rows, counts = render_pairs(pairs, tokenizer, max_length=training.max_length, skip_invalid=args.skip_invalid)
    logger.info(
        "%s: %d pairs, %d tokens; %d skipped as invalid, %d left out as too long", args.preferences, *counts.values()
    )
    rows, held_out = hold_out(rows, args.held_out)
    trainer = build_trainer(args, training, run, model, tokenizer, rows)
    reference = score(trainer, held_out)
    before = measure_preferences(reference)
    with explain_memory(training):
        outcome = trainer.train(resume_from_checkpoint=latest_trainer_checkpoint(Path(training.output_dir)))
    after = measure_preferences(score(trainer, held_out), reference=reference)
    if not trainer.is_world_process_zero():
        return
    logger.info(
        "held-out pairs whose chosen reply is the likelier: %.3f before, %.3f after",
        before["accuracy"],
        after["accuracy"],
    )
    metrics = {
        "preferences": args.preferences,
        "source": args.source,
        "pairs": counts,
        "trained_pairs": len(rows),
        "steps": trainer.state.global_step,
        "beta": training.beta,
        "lr_fraction": args.lr_fraction,
        "lora": bool(args.lora_rank),
        "held_out": {"before": before, "after": after},
        "history": pick_history(trainer.state.log_history, *HISTORY),
        **sum_up(trainer, outcome),
        "peak_memory_bytes": peak_memory_bytes(training.device),
    }
    card = [
        f"A chat model after DPO on {len(rows):,} pairs of {Path(args.preferences).name}, beta {training.beta}: the "
        f"chosen reply is the likelier in {before['accuracy']:.3f} of {before['n']} held-out pairs before, in "
        f"{after['accuracy']:.3f} after."
    ]
    if args.lora_rank:
        model = save_adapter(trainer, run.folder("adapters") / "dpo", source)
    save_stage_model(model.eval(), tokenizer, stage.folder, source, card=card)
    stage.finish(metrics)


if __name__ == "__main__":
    entry_point(main)

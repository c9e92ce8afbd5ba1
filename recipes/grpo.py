"""Reinforcement learning with a calculator: `accelerate launch recipes/grpo.py --config .../grpo.yaml`."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl import GRPOConfig, GRPOTrainer

from chatmodel.arguments import parse_arguments, requested_settings
from chatmodel.posttraining import (
    StageTraining,
    explain_memory,
    fit_to_device,
    latest_trainer_checkpoint,
    load_stage_model,
    save_stage_model,
)
from chatmodel.problems import build_problems, measure_pass, measure_prompts, open_problems
from chatmodel.reinforcement.arguments import RewardArguments
from chatmodel.reinforcement.results import collect_metrics
from chatmodel.reinforcement.reward_choice import find_rewards
from chatmodel.reinforcement.trainer import LearnFromCompletions, SkipEmptySteps
from chatmodel.rollouts import Sampler, check_lengths
from chatmodel.runs import Run
from chatmodel.runtime import UserError, entry_point, logger
from chatmodel.trainer_callbacks import stage_callbacks, sum_up


@dataclass
class RewardConfig(GRPOConfig):
    """TRL's GRPOConfig with this project's defaults."""

    bf16: bool | None = field(default=False, metadata={"help": "Not read: see mixed_precision."})
    activation_checkpointing: bool | None = field(default=False, metadata={"help": "Trade speed for memory."})
    scale_rewards: str = field(default="none", metadata={"help": "'none', 'group' or 'batch': the reward's spread."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "0: Muon and AdamW set the size of a step anyway."})

    def __post_init__(self) -> None:
        if self.num_generations < 2:
            raise UserError(
                f"num_generations={self.num_generations} must be at least 2, as a problem's completions are compared"
            )
        super().__post_init__()


class RewardTrainer(LearnFromCompletions, StageTraining, GRPOTrainer):
    """TRL's GRPOTrainer with pretraining's optimizer and our completions."""


def build_trainer(
    args: RewardArguments, training: RewardConfig, run: Run, problems: Any, held_out: Any
) -> RewardTrainer:
    model, tokenizer = load_stage_model(run.folder("sft"))
    longest = measure_prompts(tokenizer, problems, held_out)
    check_lengths(model, longest, training.max_completion_length)
    sampler = Sampler(
        model,
        tokenizer,
        max_new_tokens=training.max_completion_length,
        temperature=training.temperature,
        top_k=training.top_k or None,
        top_p=training.top_p,
        rows=args.rollout_batch_size,
        longest_prompt=longest,
        seed=training.seed,
    )
    fit_to_device(training, args.mixed_precision)
    training.output_dir = str(run.checkpoints("rl"))
    trainer = RewardTrainer(
        model=model,
        args=training,
        train_dataset=problems,
        reward_funcs=list(find_rewards(args.rewards).values()),
        processing_class=tokenizer,
        callbacks=stage_callbacks(),
        mode=args.mode,
        sampler=None if training.use_vllm else sampler,
        plan_folder=run.folder("sft"),
        lr_fraction=args.lr_fraction,
    )
    trainer.add_callback(SkipEmptySteps(lambda: trainer.nothing_to_learn))
    return trainer


def main() -> None:
    args, training = parse_arguments(RewardArguments, RewardConfig)
    args.check(training, requested_settings(sys.argv[1:]))
    run = Run(Path(args.run_dir))
    stage = run.begin("rl")
    if stage is None:
        return
    folder = Path(args.chatcore) if args.chatcore else None
    tasks = args.tasks()
    sources, held_out = open_problems(tasks, num_held_out=args.pass_examples, folder=folder)
    problems = build_problems(tasks, sources, seed=training.seed)
    trainer = build_trainer(args, training, run, problems, held_out)
    model, tokenizer = trainer.model, trainer.processing_class
    measuring = {"max_new_tokens": training.max_completion_length, "batch_size": args.rollout_batch_size}
    measuring |= {"ks": args.pass_k, "num_samples": args.pass_samples, "top_k": training.top_k or None}
    with explain_memory(training, other=f"rollout_batch_size={args.rollout_batch_size}"):
        before = measure_pass(model, tokenizer, held_out, **measuring)
        logger.info("greedy, before: %d of %d", before["correct"], before["n"])
        outcome = trainer.train(resume_from_checkpoint=latest_trainer_checkpoint(Path(training.output_dir)))
        after = measure_pass(model, tokenizer, held_out, **measuring)
    logger.info("greedy, after: %d of %d", after["correct"], after["n"])
    if not trainer.is_world_process_zero():
        return
    metrics = collect_metrics(trainer, problems, before, after)
    metrics["train_seconds"] = sum_up(trainer, outcome)["train_seconds"]
    card = [
        f"A chat model after reinforcement learning on {metrics['task']}: pass@1 on {after['n']} held-out problems "
        f"{before['accuracy']:.3f} before, {after['accuracy']:.3f} after."
    ]
    save_stage_model(model.eval(), tokenizer, stage.folder, run.folder("sft"), card=card)
    stage.finish(metrics)


if __name__ == "__main__":
    entry_point(main)

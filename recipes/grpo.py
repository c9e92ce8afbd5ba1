"""Reinforcement learning with a calculator: `accelerate launch recipes/grpo.py --config .../grpo.yaml`."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl import GRPOConfig, GRPOTrainer

from chatmodel.conversations.mixtures import MixtureEntry, open_entry
from chatmodel.conversations.render import render_prompt
from chatmodel.generation import generate_replies, mask_calculator_output
from chatmodel.posttraining import (
    PlannedOptimizer,
    SealCheckpoints,
    StopOnBadGradient,
    fit_to_device,
    latest_trainer_checkpoint,
    load_stage_model,
    pick_history,
    save_stage_model,
)
from chatmodel.problems import build_problems, measure_pass
from chatmodel.rewards import reward_answer, reward_spelling
from chatmodel.runs import Run
from chatmodel.runtime import entry_point, logger, parse_arguments, peak_memory_bytes

HISTORY = ("reward", "reward_std", "completions/mean_length", "entropy", "kl", "loss")


@dataclass
class RewardArguments:
    """What can be asked beside TRL's own GRPOConfig."""

    run_dir: Path = field(default=Path("runs/base"), metadata={"help": "The run folder."})
    task: str = field(default="GSM8K", metadata={"help": "GSM8K, Arithmetic, WordProblems, LetterCounting ..."})
    rows: int | None = field(default=None, metadata={"help": "Problems to train on; by default all of the task."})
    chatcore: Path | None = field(default=None, metadata={"help": "Folder of ChatCORE's data sets; else the Hub."})
    mixed_precision: str | None = field(default=None, metadata={"help": "'bf16' or 'no'; by default what is faster."})
    lr_fraction: float = field(default=0.05, metadata={"help": "Factor on pretraining's learning rates."})
    pass_examples: int = field(default=400, metadata={"help": "Held-out problems of the pass@1 before and after."})
    rollout_batch_size: int = field(default=64, metadata={"help": "Completions generated at once."})


@dataclass
class RewardConfig(GRPOConfig):
    """TRL's GRPOConfig with this project's defaults."""

    bf16: bool | None = field(default=False, metadata={"help": "Not read: see mixed_precision."})
    activation_checkpointing: bool | None = field(default=False, metadata={"help": "Trade speed for memory."})


class RewardTrainer(PlannedOptimizer, GRPOTrainer):
    """TRL's GRPOTrainer with pretraining's optimizer, counting what its rollouts cost."""

    rollout_tokens, rollout_seconds = 0, 0.0


def build_rollout(args: RewardArguments) -> Any:
    """TRL's rollout function: our own generation, with the calculator's tokens masked from the loss."""

    def roll_out(prompts: list[Any], trainer: RewardTrainer) -> dict[str, Any]:
        tokenizer, model = trainer.processing_class, trainer.accelerator.unwrap_model(trainer.model)
        prompt_ids = [render_prompt(tokenizer, prompt) for prompt in prompts]
        began = time.perf_counter()
        replies = generate_replies(
            model,
            tokenizer,
            prompt_ids,
            max_new_tokens=trainer.args.max_completion_length,
            temperature=trainer.args.temperature,
            top_k=trainer.args.top_k or None,
            batch_size=args.rollout_batch_size,
            keep_end=True,
        )
        completion_ids = [reply[0] for reply in replies]
        trainer.rollout_seconds += time.perf_counter() - began
        trainer.rollout_tokens += sum(len(ids) for ids in completion_ids)
        mask = [mask_calculator_output(ids, model.config.calculator) for ids in completion_ids]
        return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": None, "env_mask": mask}

    return roll_out


def main() -> None:
    args, training = parse_arguments(RewardArguments, RewardConfig)
    run = Run(Path(args.run_dir))
    stage = run.begin("rl")
    if stage is None:
        return
    model, tokenizer = load_stage_model(run.folder("sft"))
    folder = Path(args.chatcore) if args.chatcore else None
    problems = build_problems(open_entry(MixtureEntry(args.task, rows=args.rows), folder=folder))
    held_out = open_entry(MixtureEntry(args.task, rows=args.pass_examples), split="validation", folder=folder)
    model.to(training.device)
    limits = {"max_new_tokens": training.max_completion_length, "batch_size": args.rollout_batch_size}
    before = measure_pass(model, tokenizer, held_out, **limits)
    logger.info("pass@1 before: %d of %d", before["correct"], before["n"])
    fit_to_device(training, args.mixed_precision)
    training.output_dir = str(run.checkpoints("rl"))
    trainer = RewardTrainer(
        model=model,
        args=training,
        train_dataset=problems,
        reward_funcs=[reward_spelling if args.task == "SimpleSpelling" else reward_answer],
        processing_class=tokenizer,
        callbacks=[StopOnBadGradient(), SealCheckpoints()],
        rollout_func=build_rollout(args),
        plan_folder=run.folder("sft"),
        lr_fraction=args.lr_fraction,
    )
    outcome = trainer.train(resume_from_checkpoint=latest_trainer_checkpoint(Path(training.output_dir)))
    after = measure_pass(model, tokenizer, held_out, **limits)
    logger.info("pass@1 after: %d of %d", after["correct"], after["n"])
    if not trainer.is_world_process_zero():
        return
    metrics = {
        "task": args.task,
        "steps": trainer.state.global_step,
        "problems": len(problems),
        "num_generations": training.num_generations,
        "history": pick_history(trainer.state.log_history, *HISTORY),
        "pass_at_1": {
            "before": {key: before[key] for key in ("correct", "n", "accuracy")},
            "after": {key: after[key] for key in ("correct", "n", "accuracy")},
        },
        "completions": after["completions"],
        "completions_before": before["completions"],
        "lr_fraction": args.lr_fraction,
        "rollout_tokens_per_second": trainer.rollout_tokens / max(trainer.rollout_seconds, 1e-9),
        "rollout_seconds": trainer.rollout_seconds,
        "train_seconds": outcome.metrics["train_runtime"],
        "peak_memory_bytes": peak_memory_bytes(training.device),
    }
    card = [
        f"A chat model after reinforcement learning on {args.task}: pass@1 on {after['n']} held-out problems "
        f"{before['accuracy']:.3f} before, {after['accuracy']:.3f} after."
    ]
    save_stage_model(model.eval(), tokenizer, stage.folder, run.folder("sft"), card=card)
    stage.finish(metrics)


if __name__ == "__main__":
    entry_point(main)

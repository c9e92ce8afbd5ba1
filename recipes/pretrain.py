"""Pretrain a base model: `accelerate launch recipes/pretrain.py --config recipes/configs/cpu/pretrain.yaml`."""

import json

from accelerate import Accelerator, PartialState
from accelerate.utils import parse_flag_from_env

from chatmodel.runs import Run
from chatmodel.runtime import UserError, choose_precision, entry_point, logger, parse_arguments
from chatmodel.tokenizer import load_tokenizer
from chatmodel.training import PretrainArguments, Pretraining

DEFAULT_VOCAB_SIZE = 32_768


def build_accelerator(args: PretrainArguments) -> Accelerator:
    # Accelerator reads this flag itself, but the precision must be known before there is one.
    device = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).device
    precision = choose_precision(device, args.mixed_precision)
    try:
        return Accelerator(mixed_precision=precision, log_with=args.tracker, project_dir=args.run_dir)
    except (ValueError, ImportError) as error:
        raise UserError(
            f"tracker={args.tracker!r} cannot be used: {error}; install it with pip or leave the option out"
        ) from None


def find_vocab_size(run: Run) -> int:
    """Of the run's tokenizer, or what a tokenizer would have by default, so that a plan costs nothing."""
    if run.folder("tokenizer").exists():
        return len(load_tokenizer(run.folder("tokenizer")))
    logger.info("%s has no tokenizer yet, so the plan is made for %d tokens", run.run_dir, DEFAULT_VOCAB_SIZE)
    return DEFAULT_VOCAB_SIZE


def main() -> None:
    (args,) = parse_arguments(PretrainArguments)
    run = Run(args.run_dir)
    if args.dry_run:
        plan = args.plan(find_vocab_size(run))
        logger.info(
            "%s\n%s",
            json.dumps({"plan": plan.as_dict(), "arguments": vars(args)}, indent=2, default=str),
            plan.describe(),
        )
        return
    stage = run.begin("base")
    if stage is None:
        return
    accelerator = build_accelerator(args)
    pretraining = Pretraining(args, run, accelerator)
    logger.info("%s", pretraining.plan.describe())
    if args.tracker:
        accelerator.init_trackers("chatmodel", config=stage.settings)
    pretraining.train()
    pretraining.finish(stage)
    accelerator.end_training()


if __name__ == "__main__":
    entry_point(main)

"""Pretrain a base model: `accelerate launch recipes/pretrain.py --config recipes/configs/cpu/pretrain.yaml`."""

import json

from accelerate import Accelerator, PartialState

from chatmodel.runs import Run
from chatmodel.runtime import UserError, choose_precision, entry_point, logger, parse_arguments
from chatmodel.tokenizer import load_tokenizer
from chatmodel.training import PretrainArguments, Pretraining


def build_accelerator(args: PretrainArguments) -> Accelerator:
    precision = choose_precision(PartialState().device, args.mixed_precision)
    try:
        return Accelerator(mixed_precision=precision, log_with=args.tracker, project_dir=args.run_dir)
    except (ValueError, ImportError) as error:
        raise UserError(
            f"tracker={args.tracker!r} cannot be used: {error}; install it with pip or leave the option out"
        ) from None


def main() -> None:
    (args,) = parse_arguments(PretrainArguments)
    run = Run(args.run_dir)
    if args.dry_run:
        plan = args.plan(len(load_tokenizer(run.folder("tokenizer"))))
        logger.info(json.dumps(plan.as_dict(), indent=2))
        return
    stage = run.begin("base")
    if stage is None:
        return
    accelerator = build_accelerator(args)
    pretraining = Pretraining(args, run, accelerator)
    logger.info("%s", json.dumps(pretraining.plan.as_dict()))
    if args.tracker:
        accelerator.init_trackers("chatmodel", config=stage.settings)
    pretraining.train()
    pretraining.finish(stage)
    accelerator.end_training()


if __name__ == "__main__":
    entry_point(main)

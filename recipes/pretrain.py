"""Pretrain a base model: `accelerate launch recipes/pretrain.py --config recipes/configs/cpu/pretrain.yaml`."""

import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import parse_flag_from_env

from chatmodel.arguments import default_settings, parse_arguments
from chatmodel.data.corpus import check_corpus
from chatmodel.devices import choose_precision, describe_device, describe_named
from chatmodel.estimate.memory import largest_batch
from chatmodel.estimate.prediction import Prediction, check_resources, predict_run
from chatmodel.estimate.setup import EXPECTED_CORES, Setup
from chatmodel.estimate.speed import time_model
from chatmodel.report.prediction import describe_plan
from chatmodel.runs import Run
from chatmodel.runtime import UserError, entry_point, logger, write_json
from chatmodel.scaling import RunPlan
from chatmodel.tokenizer import load_tokenizer
from chatmodel.training.arguments import STORE_SHARES, PredictionArguments, PretrainArguments
from chatmodel.training.loop import Pretraining
from chatmodel.training.ranks import join_ranks
from chatmodel.workers import count_cores

VOCAB_SIZE = 32_768  # of the presets for GPUs


def build_accelerator(args: PretrainArguments) -> Accelerator:
    # Accelerator reads this flag itself, but the precision must be known before there is one.
    join_ranks(timeout=args.rank_timeout)
    timeout = timedelta(seconds=args.rank_timeout)
    device = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=timeout).device
    precision = choose_precision(device, args.mixed_precision)
    try:
        return Accelerator(mixed_precision=precision, log_with=args.tracker, project_dir=args.run_dir)
    except (ValueError, ImportError) as error:
        raise UserError(
            f"tracker={args.tracker!r} cannot be used: {error}; install it with pip or leave the option out"
        ) from None


def find_vocab_size(run: Run, expected: int | None) -> int:
    """Of the run's tokenizer, or what is expected of it, so that a plan costs nothing."""
    if run.folder("tokenizer").exists():
        return len(load_tokenizer(run.folder("tokenizer")))
    expected = VOCAB_SIZE if expected is None else expected
    logger.info("%s has no tokenizer yet, so the plan is made for vocab_size=%d", run.run_dir, expected)
    return expected


def build_setup(
    args: PretrainArguments, asked: PredictionArguments, plan: RunPlan, run: Run, accelerator: Accelerator | None
) -> Setup:
    """How the plan would run on the accelerator's device, or on the named one without an accelerator."""
    if accelerator is None:
        device = describe_named(str(asked.device_name))
        if args.fp8 and device.datasheet is not None and not device.datasheet.has_fp8:
            raise UserError(f"the {device.name} has no 8-bit floats; leave fp8 out")
        precision, num_devices, divided = args.mixed_precision or "bf16", asked.num_devices or 1, False
        cores = EXPECTED_CORES
        logger.info(
            "the machine of the %s is expected to have %d cores, which make the token store", device.name, cores
        )
    else:
        device = describe_device(accelerator.device)
        precision, num_devices, cores = accelerator.mixed_precision, accelerator.num_processes, count_cores()
        divided = accelerator.distributed_type == DistributedType.FSDP
        args.check_device(accelerator.device, divided=divided)
    setup = Setup(
        device=device,
        precision=precision,
        compiled=args.compiles_on(device.kind),
        device_batch_size=plan.fit_rows(args.device_batch_size, num_devices),
        num_devices=num_devices,
        divided=divided,
        eval_every=args.eval_every,
        eval_tokens=args.eval_tokens,
        data_is_ready=(run.folder("data") / "train").exists(),
        cores=cores,
        store_share=STORE_SHARES[args.packing],
        hourly_rate=asked.hourly_rate,
    )
    return replace(setup, device_batch_size=largest_batch(plan, setup) or 1) if args.auto_batch else setup


def predict(
    args: PretrainArguments, asked: PredictionArguments, run: Run, accelerator: Accelerator | None
) -> tuple[RunPlan, Setup, Prediction]:
    """The plan and what it will take; to be called before anything else is built, and by every rank."""
    plan = args.plan(find_vocab_size(run, asked.vocab_size))
    setup = build_setup(args, asked, plan, run, accelerator)
    return plan, setup, predict_run(plan, setup, speed=time_model(plan, setup) if asked.measure else None)


def write_plan(args: PretrainArguments, asked: PredictionArguments, plan: RunPlan, prediction: Prediction) -> None:
    for name, text in describe_plan(plan, prediction, lr_fraction=args.lr_fraction):
        sys.stdout.write(f"{name + ':':<16}{text}\n")
    if asked.plan_json is not None:
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        known = {"plan": plan.as_dict(), "prediction": prediction.as_dict(), "arguments": settings}
        write_json(Path(asked.plan_json), known)


def main() -> None:
    args, asked = parse_arguments(PretrainArguments, PredictionArguments)
    asked.check(dry_run=args.dry_run)
    run = Run(args.run_dir)
    if args.dry_run:
        check_corpus(args.dataset, on_bad_shard=args.on_bad_shard)
        accelerator = build_accelerator(args) if asked.device_name is None else None
        plan, setup, prediction = predict(args, asked, run, accelerator)
        if accelerator is None or accelerator.is_main_process:
            write_plan(args, asked, plan, prediction)
        check_resources(plan, setup, prediction, run)
        return
    defaults = default_settings(PretrainArguments, PredictionArguments)
    stage = run.begin("base", defaults=defaults, accept_changes=args.accept_changes)
    if stage is None:
        return
    check_corpus(args.dataset, on_bad_shard=args.on_bad_shard)
    accelerator = build_accelerator(args)
    prediction = None
    if accelerator.device.type == "cuda":
        # On a CPU it takes steps of models like this one, too long for what nobody asked for; --dry_run does it.
        plan, setup, prediction = predict(args, asked, run, accelerator)
        check_resources(plan, setup, prediction, run)
    pretraining = Pretraining(args, run, accelerator)
    logger.info("%s", pretraining.plan.describe())
    if args.tracker:
        accelerator.init_trackers("chatmodel", config=stage.settings)
    pretraining.train()
    pretraining.finish(stage, prediction=None if prediction is None else prediction.as_dict())
    accelerator.end_training()


if __name__ == "__main__":
    entry_point(main)

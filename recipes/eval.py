"""Evaluate a stage of a run, or any causal model: `python recipes/eval.py --run_dir runs/cpu --stage base`."""

from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer

from chatmodel.arguments import parse_arguments
from chatmodel.checkpoint import load_model
from chatmodel.devices import choose_precision
from chatmodel.environment import describe_environment
from chatmodel.evaluation.decisions import KeptDecisions, model_key
from chatmodel.evaluation.stages import EvalArguments, evaluate_stage, find_decisions
from chatmodel.model_folders import check_model_name
from chatmodel.runs import Run
from chatmodel.runtime import UserError, entry_point, logger, write_json
from chatmodel.tokenizer import load_tokenizer


def load_any_model(args: EvalArguments) -> tuple[Any, Any]:
    """A model and tokenizer from a folder or the Hub, with the tokens that generation needs filled in."""
    if not check_model_name(args.model):
        logger.info("asking the Hub for model %s (for a minute, if it does not answer)", args.model)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            args.model, dtype=torch.float32, trust_remote_code=args.trust_remote_code
        )
        tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=args.trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"model {args.model} cannot be loaded: {' '.join(str(error).split())}") from None
    end = tokenizer.eos_token or tokenizer.bos_token
    for name in ("bos_token", "eos_token", "pad_token"):
        if getattr(tokenizer, name) is None:
            setattr(tokenizer, name, end)
    return model, tokenizer


def measure(
    args: EvalArguments, run: Run | None, model: Any, tokenizer: Any, accelerator: Accelerator
) -> dict[str, Any]:
    """The stage's metrics, measured on this process's device: in bf16 on CUDA, elsewhere in fp32, unless told so."""
    device = accelerator.device
    precision = choose_precision(device, args.mixed_precision or (None if device.type == "cuda" else "no"))
    with torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext():
        key = model_key(model.to(device).eval(), tokenizer, precision)
        kept = KeptDecisions(find_decisions(args, run), model_key=key)
        metrics = evaluate_stage(args, run, model, tokenizer, kept=kept)
    return metrics | {"device": str(device), "mixed_precision": precision, "world_size": accelerator.num_processes}


def main() -> None:
    (args,) = parse_arguments(EvalArguments)
    run = None if args.run_dir is None else Run(args.run_dir)
    stage = None if run is None else run.begin(f"{args.stage}_eval")
    if run is not None and stage is None:
        return
    accelerator = Accelerator()  # PartialState alone would overlook several ranks on CPUs
    if run is None:
        model, tokenizer = load_any_model(args)
    else:
        folder = run.folder(args.stage)
        model, tokenizer = load_model(folder, dtype=torch.float32), load_tokenizer(folder)
    metrics = measure(args, run, model, tokenizer, accelerator)
    if accelerator.is_main_process and stage is not None:
        stage.finish(metrics)
    elif accelerator.is_main_process:
        write_json(args.output, {"model": args.model, "environment": describe_environment(), "metrics": metrics})
    if accelerator.is_main_process:
        find_decisions(args, run).unlink(missing_ok=True)  # they are in the result now
    accelerator.end_training()  # closes the process group


if __name__ == "__main__":
    entry_point(main)

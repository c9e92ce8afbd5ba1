"""What does a pretraining run leave behind when it is done, and how fast was it for its devices?"""

from typing import Any

import torch
from accelerate import Accelerator

from chatmodel.checkpoint import save_model_folder
from chatmodel.data.store import TokenStore
from chatmodel.devices import find_datasheet, peak_memory_bytes
from chatmodel.estimate.prediction import measure_disk
from chatmodel.model import GPTForCausalLM
from chatmodel.runs import Stage
from chatmodel.runtime import write_json
from chatmodel.scaling import RunPlan
from chatmodel.training.arguments import PretrainArguments, count_passes
from chatmodel.training.state import TrainState


def flops_share(plan: RunPlan, tokens_per_second: float, accelerator: Accelerator) -> float | None:
    """Model FLOPs utilisation: the share of the devices' datasheet bf16 rate; None where that is unknown."""
    if accelerator.device.type != "cuda":
        return None
    datasheet = find_datasheet(torch.cuda.get_device_name(accelerator.device))
    if datasheet is None:
        return None
    return tokens_per_second * plan.flops_per_token / (datasheet.flops * accelerator.num_processes)


def write_results(
    stage: Stage,
    *,
    args: PretrainArguments,
    plan: RunPlan,
    state: TrainState,
    accelerator: Accelerator,
    model: GPTForCausalLM,
    tokenizer: Any,
    store: TokenStore,
    samples: list[dict[str, str]],
    prediction: dict[str, Any] | None,
) -> None:
    """Write the model folder and the stage's result; by the main process only."""
    speed = state.tokens_per_second(plan.total_batch_tokens)
    val_bpbs = [evaluation["val_bpb"] for evaluation in state.evaluations]
    metrics = {
        "plan": plan.as_dict(),
        "parameters": plan.parameters,
        "flops_per_token": plan.flops_per_token,
        "total_flops": plan.total_flops,
        "train_tokens": plan.train_tokens,
        "steps": plan.steps,
        "train_seconds": state.train_seconds,
        "first_step_seconds": state.first_step_seconds,
        "tokens_per_second": speed,
        "mfu": flops_share(plan, speed, accelerator),
        "peak_memory_bytes": peak_memory_bytes(accelerator.device),
        "world_size": accelerator.num_processes,
        "device": str(accelerator.device),
        "device_batch_size": state.device_batch_size,
        "lr_fraction": args.lr_fraction,
        "packing": args.packing,
        "documents_apart": args.documents_apart,
        "dataset": store.manifest,
        "val_bpb_within_documents": args.documents_apart,
        "passes": count_passes(plan, store),
        "val_bpb_min": min(val_bpbs),
        "val_bpb_final": val_bpbs[-1],
        "core_estimate": state.evaluations[-1].get("core"),
        "history": state.history,
        "evaluations": state.evaluations,
        "samples": samples,
    }
    card = [
        f"A base model of {plan.parameters:,} parameters, pretrained on {plan.train_tokens:,} tokens of "
        f"`{args.dataset}`. Validation: {val_bpbs[-1]:.4f} bits per byte of packed rows, "
        f"{'attending within documents' if args.documents_apart else 'attending over whole rows'}.",
    ]
    save_model_folder(model, tokenizer, stage.folder, card=card)
    write_json(stage.folder / "plan.json", plan.as_dict())
    if state.changed_settings:
        metrics["changed_settings"] = state.changed_settings
    if prediction is not None:
        metrics |= {"prediction": prediction, "disk_bytes": measure_disk(stage.run)}
    stage.finish(metrics)

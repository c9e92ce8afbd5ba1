"""What is kept of a stage of fine-tuning: sizes, losses, measurements and samples on the way, speed."""

from collections.abc import Sequence
from typing import Any

from chatmodel.devices import peak_memory_bytes
from chatmodel.finetuning.trainer import ConversationTraining
from chatmodel.posttraining import pick_history
from chatmodel.trainer_callbacks import sum_up

HISTORY = ("loss", "grad_norm", "learning_rate", "tokens_per_second")


def gather_metrics(trainer: Any, outcome: Any, counts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The metrics of a finished training.

    Args:
        trainer: a Trainer, with or without `ConversationTraining`, which measures more.
        outcome: what its `train` returned.
        counts: of the mixture's entries, from `load_mixture`.
    """
    log = trainer.state.log_history
    evaluations = [describe_evaluation(entry) for entry in log if "eval_loss" in entry]
    last = evaluations[-1] if evaluations else {}
    metrics = {
        "mixture": list(counts),
        "rows": sum(count["rows"] for count in counts),
        "steps": trainer.state.global_step,
        **sum_up(trainer, outcome),
        "validation_loss": last.get("validation_loss"),
        "validation_bpb": last.get("validation_bpb"),
        "history": pick_history(log, *HISTORY),
        "evaluations": evaluations,
        "world_size": trainer.args.world_size,
        "peak_memory_bytes": peak_memory_bytes(trainer.args.device),
    }
    if isinstance(trainer, ConversationTraining):
        metrics["packed_rows"] = len(trainer.rows.rows)
        metrics["loss_scale"] = trainer.loss_scale
        metrics["samples"] = [{"step": entry["step"]} | sample for entry in log for sample in entry.get("samples", ())]
        metrics["tokens_per_second"] = trainer.tokens_per_second
    else:
        tokens = pick_history(log, "num_tokens")[-1]["num_tokens"]
        metrics["tokens_per_second"] = tokens / metrics["train_seconds"]
    return metrics


def describe_evaluation(entry: dict[str, Any]) -> dict[str, Any]:
    """An evaluation of a Trainer's log, with our names; `sources` and `accuracies` are by data set and task."""
    record = {"step": entry["step"], "validation_loss": entry["eval_loss"]}
    if "eval_bits_per_byte" in entry:
        record["validation_bpb"] = entry["eval_bits_per_byte"]
    for key, ending in (("sources", "_loss"), ("accuracies", "_accuracy")):
        found = {
            name.removeprefix("eval_").removesuffix(ending): value
            for name, value in entry.items()
            if name.startswith("eval_") and name.endswith(ending) and name != "eval_loss"
        }
        if found:
            record[key] = found
    return record

"""What was predicted of a pretraining run, for people; and beside it what happened."""

from typing import Any

from chatmodel.estimate.prediction import Prediction
from chatmodel.report.document import Block, Facts, Table
from chatmodel.report.formats import (
    format_bytes,
    format_count,
    format_count_rounded,
    format_decimal,
    format_duration,
    format_flops,
    format_money,
    format_percent,
    format_value,
)
from chatmodel.report.results import StageResult, pick_number
from chatmodel.scaling import RunPlan


def describe_plan(plan: RunPlan, prediction: Prediction, *, lr_fraction: float) -> list[tuple[str, str]]:
    """A plan and what it will take, in named lines."""
    rows, devices = prediction.device_batch_size, prediction.num_devices
    accumulation = plan.accumulation_steps(rows, devices)
    rates = ", ".join(f"{name} {group.lr * lr_fraction:.3g}" for name, group in plan.groups.items())
    model = plan.model
    return [
        ("recipe", f"{plan.recipe}, depth {plan.depth}, width {model['hidden_size']}, heads {_heads(model)}"),
        ("parameters", f"{plan.parameters:,}, vocabulary {model['vocab_size']:,}"),
        ("tokens", f"{plan.train_tokens:,} ({plan.tokens_per_parameter:.1f} a parameter)"),
        ("steps", f"{plan.steps:,} of {plan.total_batch_tokens:,} tokens"),
        ("a step is", f"{accumulation:,} x {rows:,} rows of {plan.sequence_length:,} tokens on {devices:,} device(s)"),
        ("learning rates", rates),
        ("FLOPs", f"{format_flops(plan.total_flops)}, {format_flops(plan.flops_per_token)} a token"),
        *_describe_cost(prediction),
    ]


def _heads(model: dict[str, Any]) -> str:
    return f"{model['num_attention_heads']}, layers {model['num_hidden_layers']}"


def _describe_cost(prediction: Prediction) -> list[tuple[str, str]]:
    precision = "bf16" if prediction.precision == "bf16" else "fp32"
    speed = prediction.tokens_per_second
    low, high = (format_count_rounded(speed * one) for one in (1 / prediction.factor, prediction.factor))
    mfu = "" if prediction.mfu is None else f", {format_percent(prediction.mfu, 1)} of the datasheet's FLOPs"
    seconds = prediction.total_seconds
    least, most = (format_duration(seconds * one) for one in (1 / prediction.factor, prediction.factor))
    parts = ", ".join(f"{name} {format_duration(value)}" for name, value in prediction.seconds.items() if value)
    rows = [
        ("device", f"{prediction.num_devices} x {prediction.device}, {precision}"),
        ("speed", f"{format_count_rounded(speed)} tokens a second ({low} to {high}){mfu}"),
        ("known by", prediction.basis),
        ("time", f"{format_duration(seconds)} ({least} to {most}): {parts}"),
    ]
    if prediction.cost is not None and prediction.hourly_rate is not None:
        price = f"{format_money(prediction.cost)} at {format_money(prediction.hourly_rate)} an hour"
        rows.append(("cost", price))
    memory = f"{format_bytes(prediction.peak_memory_bytes)} of {format_bytes(prediction.memory_limit_bytes)} at most"
    return [
        *rows,
        ("memory", f"{memory}: {_list_sizes(prediction.memory)} (not all at once)"),
        ("disk", f"{format_bytes(prediction.disk_bytes)} at most: {_list_sizes(prediction.disk)}"),
    ]


def _list_sizes(parts: dict[str, int]) -> str:
    return ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items())


def compare_prediction(result: StageResult) -> list[Block]:
    """A table of what was predicted, what happened and their ratio; nothing where nothing was predicted."""
    metrics = result.metrics
    predicted = metrics.get("prediction")
    if not isinstance(predicted, dict):
        return []
    spent = pick_number(result.record, "seconds")
    rate = pick_number(predicted, "hourly_rate")
    trained = pick_number(metrics, "train_seconds")
    behind = None if trained is None else trained - (pick_number(metrics, "first_step_seconds") or 0)
    pairs: list[tuple[str, Any, Any, Any]] = [
        (
            "First step, which may compile",
            *_pick_pair(metrics, ("seconds", "compiling"), "first_step_seconds"),
            format_duration,
        ),
        ("Training time behind it", pick_number(predicted, "seconds", "training"), behind, format_duration),
        ("Time of the whole stage", pick_number(predicted, "total_seconds"), spent, format_duration),
        ("Tokens per second", *_pick_pair(metrics, ("tokens_per_second",), "tokens_per_second"), format_count_rounded),
        ("Peak memory of a device", *_pick_pair(metrics, ("peak_memory_bytes",), "peak_memory_bytes"), format_bytes),
        ("Disk, afterwards", *_pick_pair(metrics, ("disk_kept_bytes",), "disk_bytes"), format_bytes),
    ]
    if rate is not None:
        cost = None if spent is None else spent / 3600 * rate
        pairs.append(("Cost (USD)", pick_number(predicted, "cost"), cost, lambda value: format_decimal(value, 2)))
    rows = [(label, write(a), write(b), _divide(b, a)) for label, a, b, write in pairs]
    caption = f"Predicted before the start ({format_value(predicted.get('basis'))}), and what happened"
    facts = [
        ("Expected error, as a factor", format_decimal(predicted.get("factor"), 2)),
        ("Devices", f"{format_count(predicted.get('num_devices'))} x {format_value(predicted.get('device'))}"),
    ]
    return [Table(("", "Predicted", "Happened", "Ratio"), rows, caption=caption), Facts(facts)]


def _pick_pair(metrics: dict[str, Any], predicted: tuple[str, ...], happened: str) -> tuple[Any, Any]:
    return pick_number(metrics, "prediction", *predicted), pick_number(metrics, happened)


def _divide(happened: Any, predicted: Any) -> str:
    return format_decimal(happened / predicted, 2) if happened is not None and predicted else format_value(None)

"""The report's section on reinforcement learning: what it changed, how it went, and what was said on the way."""

import math
from typing import Any

from chatmodel.report.document import Block, Facts, Paragraph, Section, Series, Table, Transcript
from chatmodel.report.formats import (
    clip_text,
    format_count,
    format_decimal,
    format_named,
    format_signed,
    format_value,
)
from chatmodel.report.results import (
    StageResult,
    collect_series,
    find_not_run,
    pick,
    pick_named,
    pick_number,
    pick_records,
)
from chatmodel.report.stage_sections import build_figure, build_stage_section, list_others, thin_records
from chatmodel.report.tables import (
    MAX_SAMPLE_CHARS,
    format_accuracy,
    format_measured,
    list_not_run,
    read_accuracy,
    write_content,
)

MAX_COMPLETIONS = 4
FACTS = {
    "mode": "Mode",
    "problems": "Problems",
    "num_generations": "Completions of a problem",
    "lr_fraction": "Share of pretraining's learning rates",
    "world_size": "Number of processes",
    "rollout_tokens_per_second": "Sampled tokens per second",
    "rollout_seconds": "Time spent sampling",
    "train_seconds": "Total training time",
    "tokens_per_second": "Tokens per second",
    "peak_memory_bytes": "Peak memory usage",
}
CURVES = {  # panel: its series, by their keys in the history
    "mean reward": {"reward": "reward"},
    "share of completions": {
        "problems without a difference": "frac_reward_zero_std",
        "cut at the longest": "clipped_ratio",
    },
    "entropy of trained tokens (nats)": {"entropy": "entropy"},
    "KL to the start (nats a token)": {"KL": "kl"},
    "engine beside training forward (nats)": {"mean difference of log-probabilities": "sampling_logp_difference"},
}


def build_rl(results: dict[str, StageResult]) -> Section:
    """What reinforcement learning did to its reward, with counts, and some of what was said on the way."""
    return build_stage_section("Chat RL", results["rl"], _describe_rl)


def _describe_rl(result: StageResult) -> list[Block]:
    metrics = result.metrics
    history = pick_records(metrics, "history")
    rows = [("Task", format_value(metrics.get("task"))), ("Number of steps", format_count(metrics.get("steps")))]
    rows += [(label, format_named(key, metrics[key])) for key, label in FACTS.items() if key in metrics]
    reward = collect_series("reward", history, "reward")
    blocks: list[Block] = [Facts(rows), *_compare_pass(metrics), *_compare_samples(metrics), *_compare_reward(reward)]
    panels = {
        title: [collect_series(label, history, key) for label, key in series.items()]
        for title, series in CURVES.items()
    }
    for name in pick_named(metrics, "rewards"):
        panels["mean reward"].append(collect_series(name, history, f"rewards/{name}"))
    length = "mean_length" if any("mean_length" in record for record in history) else "completion_length"
    panels["completion length (tokens)"] = [collect_series("mean length", history, length)]
    blocks += build_figure("rl_reward", "RL: reward, completions and what they are drawn from", panels) or [
        Paragraph("Reward curve: not recorded")
    ]
    blocks += _show_completions("before RL", pick_records(metrics, "completions_before"))
    blocks += _show_completions("sampled", pick_records(metrics, "completions_sampled"))
    blocks += _show_completions("after RL", pick_records(metrics, "completions")) or [
        Paragraph("RL completions: not recorded")
    ]
    shown = {"task", "steps", "history", "pass_at_1", "sampled", "change", *FACTS}
    return [*blocks, *list_others(metrics, shown | {"completions", "completions_before", "completions_sampled"})]


def _compare_pass(metrics: dict[str, Any]) -> list[Block]:
    measured = metrics.get("pass_at_1")
    if (not_run := find_not_run(measured, "pass@1")) is not None:
        return [not_run]
    rows: list[tuple[str, ...]] = []
    for label, key in (("before RL", "before"), ("after RL", "after")):
        one = pick(measured, key)
        counts = f"{format_count(pick(one, 'correct'))} / {format_count(pick(one, 'n'))}"
        rows.append((label, format_accuracy(one), counts))
    paired = pick(metrics, "change", "greedy")
    (a, a_error, _), (b, b_error, _) = (read_accuracy(pick(measured, key)) for key in ("before", "after"))
    if (change := pick_number(paired, "difference")) is not None:
        rows.append(("change (paired)", _format_change(change, pick_number(paired, "stderr")), ""))
    elif a is not None and b is not None:
        together = math.hypot(a_error, b_error) if a_error is not None and b_error is not None else None
        rows.append(("change", _format_change(b - a, together), ""))
    parts = {"before RL": pick(measured, "before"), "after RL": pick(measured, "after")}
    return [Table(("Model", "pass@1 ± stderr", "Correct / n"), rows), *list_not_run(parts)]


def _format_change(change: float, error: float | None) -> str:
    return format_signed(change) + ("" if error is None else f" ± {format_decimal(error)}")


def _compare_samples(metrics: dict[str, Any]) -> list[Block]:
    """pass@k from samples at temperature 1; the change's standard error is that of the problems' differences."""
    before, after = (pick_named(metrics, "sampled", when, "pass_at_k") for when in ("before", "after"))
    rows = []
    for k in before:
        cells = [
            format_measured(pick_number(each, k, "value"), pick_number(each, k, "stderr")) for each in (before, after)
        ]
        change = pick(metrics, "change", f"pass@{k}")
        difference = pick_number(change, "difference")
        moved = "" if difference is None else _format_change(difference, pick_number(change, "stderr"))
        rows.append((f"pass@{k}", *cells, moved))
    if not rows:
        return []
    count = format_count(pick(metrics, "sampled", "before", "num_samples"))
    return [Table((f"Of {count} samples", "Before ± stderr", "After ± stderr", "Change ± paired stderr"), rows)]


def _compare_reward(reward: Series) -> list[Block]:
    values = [value for _, value in reward.points]
    if len(values) < 2:
        return []
    quarter = max(1, len(values) // 4)
    rows: list[tuple[str, ...]] = []
    for label, part in (("first", values[:quarter]), ("last", values[-quarter:])):
        mean = sum(part) / len(part)
        spread = sum((value - mean) ** 2 for value in part)
        error = math.sqrt(spread / (len(part) - 1) / len(part)) if len(part) > 1 else None
        rows.append((f"{label} quarter", format_count(len(part)), format_measured(mean, error)))
    return [Table(("Part of training", "Points", "Mean reward ± stderr"), rows)]


def _show_completions(when: str, completions: list[dict[str, Any]]) -> list[Block]:
    shown: list[Block] = []
    for i, record in enumerate(thin_records(completions, MAX_COMPLETIONS)):
        step = f", step {format_count(record['step'])}" if "step" in record else ""
        caption = f"Completion {i + 1} {when}{step}: reward {format_value(record.get('reward'))}"
        texts = [turn for key in ("prompt", "completion") for turn in _split_turns(key, record.get(key))]
        shown.append(Transcript(caption, texts))
    return shown


def _split_turns(label: str, said: Any) -> list[tuple[str, str]]:
    """A prompt or completion, plain or as messages, as turns of (role, text)."""
    messages = pick_records({label: said}, label)
    turns = [(str(m["role"]), write_content(m.get("content"))) for m in messages if "role" in m]
    return [(role, clip_text(text, 2 * MAX_SAMPLE_CHARS)) for role, text in turns or [(label, write_content(said))]]

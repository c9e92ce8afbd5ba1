"""The report's sections on mid-training, SFT, RL and the chat evaluations after each of them."""

import math
from typing import Any

from chatmodel.report.document import Block, Facts, Paragraph, Section, Series, Table, Transcript
from chatmodel.report.formats import (
    clip_text,
    format_bytes,
    format_count,
    format_count_rounded,
    format_decimal,
    format_duration,
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
    build_mixture_table,
    build_sample_table,
    build_skill_table,
    build_task_table,
    build_transcripts,
    format_accuracy,
    format_measured,
    list_not_run,
    read_accuracy,
    write_content,
)

MAX_COMPLETIONS = 4
TRAINING_FORMATS = {
    "rows": ("Training rows", format_count),
    "steps": ("Number of iterations", format_count),
    "world_size": ("Number of processes", format_count),
    "train_loss": ("Training loss", format_decimal),
    "validation_loss": ("Validation loss", format_decimal),
    "validation_bpb": ("Validation bpb", format_decimal),
    "lora": ("LoRA", format_value),
    "tokens_per_second": ("Tokens per second", format_count_rounded),
    "train_seconds": ("Total training time", format_duration),
    "peak_memory_bytes": ("Peak memory usage", format_bytes),
}
OPTIONAL_KEYS = frozenset({"world_size", "train_seconds"})


def build_midtraining(results: dict[str, StageResult]) -> Section:
    """Mixture, losses and validation bpb of mid-training."""
    return build_stage_section("Midtraining", results["mid"], _describe_chat_training)


def build_sft(results: dict[str, StageResult]) -> Section:
    """Mixture and losses of supervised fine-tuning."""
    return build_stage_section("Chat SFT", results["sft"], _describe_chat_training)


def _describe_chat_training(result: StageResult) -> list[Block]:
    metrics, stage = result.metrics, result.stage
    optional = OPTIONAL_KEYS if stage == "mid" else OPTIONAL_KEYS | {"validation_bpb"}
    rows = [
        (label, formatter(metrics.get(key)))
        for key, (label, formatter) in TRAINING_FORMATS.items()
        if key in metrics or key not in optional
    ]
    history, evaluations = pick_records(metrics, "history"), pick_records(metrics, "evaluations")
    bpbs = [pick_number(record, "validation_bpb") for record in (*evaluations, metrics)]
    known = [value for value in bpbs if value is not None]
    if known or "validation_bpb" not in optional:
        rows.append(("Minimum validation bpb", format_decimal(min(known) if known else None)))
    mixture = pick_records(metrics, "mixture")
    blocks: list[Block] = [Facts(rows)]
    blocks.append(build_mixture_table(mixture) if mixture else Paragraph("Mixture: not recorded"))
    losses = [
        collect_series("training loss", history, "loss"),
        collect_series("validation loss", evaluations, "validation_loss"),
    ]
    panels = {"loss": losses, "validation bpb": [collect_series("validation bpb", evaluations, "validation_bpb")]}
    caption = "Mid-training loss" if stage == "mid" else "SFT loss"
    blocks += build_figure(f"{stage}_loss", caption, panels) or [Paragraph("Loss curve: not recorded")]
    return [*blocks, *list_others(metrics, {*TRAINING_FORMATS, "mixture", "history", "evaluations"})]


def build_chat_evaluation(results: dict[str, StageResult], stage: str) -> Section:
    """ChatCORE, taught skills and sample conversations of the model of `stage` (mid, sft or rl)."""
    return build_stage_section(f"Chat evaluation {stage}", results[f"{stage}_eval"], _describe_chat)


def _describe_chat(result: StageResult) -> list[Block]:
    metrics = result.metrics
    blocks = [*_describe_chatcore(metrics.get("chatcore")), *_describe_skills(metrics.get("skills"))]
    samples = pick_records(metrics, "samples")
    spoken = [sample for sample in samples if "messages" in sample]
    blocks += build_transcripts(spoken, caption="Sample conversation")
    if completed := [sample for sample in samples if "messages" not in sample]:
        blocks.append(build_sample_table(completed))
    if not samples:
        blocks.append(Paragraph("Sample conversations: not recorded"))
    return [*blocks, *list_others(metrics, {"chatcore", "skills", "samples"})]


def _describe_chatcore(chatcore: Any) -> list[Block]:
    if (not_run := find_not_run(chatcore, "ChatCORE")) is not None:
        return [not_run]
    value, tasks = pick(chatcore, "chatcore"), pick_named(chatcore, "tasks")
    missing = find_not_run(value)
    text = (
        "not run" if missing else format_measured(pick_number(chatcore, "chatcore"), pick_number(chatcore, "stderr"))
    )
    if value is None and any(find_not_run(task) for task in tasks.values()):
        text = "not run: some of its tasks were not run"
    blocks: list[Block] = [Facts([("ChatCORE metric", text)])]
    blocks.append(build_task_table(tasks) if tasks else Paragraph("ChatCORE tasks: not recorded"))
    return [*blocks, *list_not_run({"ChatCORE": value, **tasks})]


def _describe_skills(skills: Any) -> list[Block]:
    if (not_run := find_not_run(skills, "Taught skills")) is not None:
        return [not_run]
    if not pick_named(skills):
        return [Paragraph("Taught skills: not recorded")]
    return [build_skill_table(skills), *list_not_run(skills)]


def build_rl(results: dict[str, StageResult]) -> Section:
    """What reinforcement learning did to its reward, with counts, and some of what was said on the way."""
    return build_stage_section("Chat RL", results["rl"], _describe_rl)


def _describe_rl(result: StageResult) -> list[Block]:
    metrics = result.metrics
    history = pick_records(metrics, "history")
    optional = {
        key: metrics[key] for key in OPTIONAL_KEYS | {"tokens_per_second", "peak_memory_bytes"} if key in metrics
    }
    rows = [("Task", format_value(metrics.get("task"))), ("Number of steps", format_count(metrics.get("steps")))]
    rows += [(TRAINING_FORMATS[key][0], TRAINING_FORMATS[key][1](value)) for key, value in sorted(optional.items())]
    reward = collect_series("reward", history, "reward")
    length = "mean_length" if any("mean_length" in record for record in history) else "completion_length"
    panels = {
        "mean reward": [reward],
        "completion length (tokens)": [collect_series("mean length", history, length)],
    }
    blocks: list[Block] = [Facts(rows), *_compare_pass(metrics.get("pass_at_1")), *_compare_reward(reward)]
    blocks += build_figure("rl_reward", "RL: reward and completion length", panels) or [
        Paragraph("Reward curve: not recorded")
    ]
    completions = pick_records(metrics, "completions")
    blocks += _show_completions("before RL", pick_records(metrics, "completions_before"))
    blocks += _show_completions("after RL", completions) or [Paragraph("RL completions: not recorded")]
    shown = {"task", "steps", "history", "pass_at_1", "completions", "completions_before", *optional}
    return [*blocks, *list_others(metrics, shown)]


def _compare_pass(measured: Any) -> list[Block]:
    if (not_run := find_not_run(measured, "pass@1")) is not None:
        return [not_run]
    rows: list[tuple[str, ...]] = []
    for label, key in (("before RL", "before"), ("after RL", "after")):
        one = pick(measured, key)
        counts = f"{format_count(pick(one, 'correct'))} / {format_count(pick(one, 'n'))}"
        rows.append((label, format_accuracy(one), counts))
    (a, a_error, _), (b, b_error, _) = (read_accuracy(pick(measured, key)) for key in ("before", "after"))
    if a is not None and b is not None:
        change = format_signed(b - a)
        if a_error is not None and b_error is not None:
            change += f" ± {format_decimal(math.hypot(a_error, b_error))}"
        rows.append(("change", change, ""))
    parts = {"before RL": pick(measured, "before"), "after RL": pick(measured, "after")}
    return [Table(("Model", "pass@1 ± stderr", "Correct / n"), rows), *list_not_run(parts)]


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

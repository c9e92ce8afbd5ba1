"""The report's sections on mid-training, SFT, and the chat evaluations after them and after RL."""

from typing import Any

from chatmodel.report.document import Block, Facts, Paragraph, Section, Table
from chatmodel.report.formats import (
    format_bytes,
    format_count,
    format_count_rounded,
    format_decimal,
    format_duration,
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
    build_mixture_table,
    build_sample_table,
    build_skill_table,
    build_task_table,
    build_transcripts,
    format_measured,
    list_not_run,
)

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
    blocks += _list_sources(evaluations)
    samples = pick_records(metrics, "samples")
    shown_steps = {samples[0].get("step"), samples[-1].get("step")} if samples else set()
    for step in sorted(shown_steps, key=lambda step: pick_number({"step": step}, "step") or 0):
        said = [sample for sample in samples if sample.get("step") == step]
        blocks += build_transcripts(said, caption=f"Said at step {format_count(step)},")
    return [*blocks, *list_others(metrics, {*TRAINING_FORMATS, "mixture", "history", "evaluations", "samples"})]


def _list_sources(evaluations: list[dict[str, Any]]) -> list[Block]:
    """Validation loss by data set, and accuracy by task where tasks were asked, at evaluations evenly chosen."""
    blocks: list[Block] = []
    for key, title in (("sources", "Validation loss of"), ("accuracies", "Accuracy in")):
        records = thin_records([record for record in evaluations if pick_named(record.get(key))])
        names = list(dict.fromkeys(name for record in records for name in record[key]))
        rows = [
            (format_count(record.get("step")), *(format_decimal(record[key].get(name)) for name in names))
            for record in records
        ]
        if rows:
            blocks.append(Table((f"Step; {title}", *names), rows))
    return blocks


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

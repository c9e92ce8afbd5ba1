"""The report's sections on the tokenizer and the base model."""

from typing import Any

from chatmodel.report.document import Block, Facts, NotRun, Paragraph, Section, Table
from chatmodel.report.formats import (
    format_bytes,
    format_count,
    format_count_rounded,
    format_decimal,
    format_duration,
    format_flops,
    format_percent,
    format_signed,
    format_value,
)
from chatmodel.report.prediction import compare_prediction
from chatmodel.report.results import (
    StageResult,
    collect_series,
    describe_context,
    find_not_run,
    flatten_values,
    pick,
    pick_named,
    pick_number,
    pick_records,
)
from chatmodel.report.stage_sections import (
    build_figure,
    build_stage_section,
    describe_source,
    list_others,
    list_settings,
    thin_records,
)
from chatmodel.report.tables import build_sample_table, build_task_table, format_measured, list_not_run
from chatmodel.runs import STAGE_INPUTS

NO_ESTIMATE = "not run: pretraining was given no CORE bundle (--eval_bundle)"
NO_PEAK = "unknown: no peak FLOPs are known for this device"
BASELINES = {"GPT-2": "gpt2", "GPT-4": "gpt4"}


def build_tokenizer_training(results: dict[str, StageResult]) -> Section:
    """Size, training text and time, bytes per token."""
    return build_stage_section("Tokenizer training", results["tokenizer"], _describe_tokenizer)


def _describe_tokenizer(result: StageResult) -> list[Block]:
    metrics = result.metrics
    counts = ("vocab_size", "num_special_tokens", "max_chars", "doc_cap", "train_chars", "train_documents")
    rows = [(key, format_count(metrics.get(key))) for key in counts]
    rows.append(("train_time", format_duration(metrics.get("train_seconds"))))
    lengths = pick(metrics, "token_bytes")
    rows += [(f"token_bytes_{key}", format_count(pick(lengths, key))) for key in ("min", "max")]
    rows += [(f"token_bytes_{key}", format_decimal(pick(lengths, key))) for key in ("mean", "std")]
    rows += list(flatten_values({"dataset": metrics.get("dataset")}))
    others = list_others(metrics, {*counts, "train_seconds", "token_bytes", "dataset", "comparison"})
    return [Facts(rows), *others]


def build_tokenizer_evaluation(results: dict[str, StageResult]) -> Section:
    """Tokens per text beside the tokenizers of GPT-2 and GPT-4."""
    title, result = "Tokenizer evaluation", results["tokenizer"]
    if (missing := result.missing) is not None:
        return Section(title, [missing])
    comparison = result.metrics.get("comparison")
    texts = pick_records(comparison, "texts")
    blocks: list[Block] = [describe_source(result)]
    tables = [_compare_baseline(name, key, texts) for name, key in BASELINES.items()]
    blocks += [table for table in tables if table is not None]
    if (not_run := find_not_run(comparison, "Comparison")) is not None:
        blocks.append(not_run)
    elif not any(tables):
        blocks.append(Paragraph("Comparison: not recorded"))
    if texts and not any(tables):
        blocks.append(_list_ours(texts))
    note = "Ratio is bytes per token; higher is better."
    if any(tables):
        note += " Relative difference is how many tokens fewer (+) or more (-) ours needs."
    return Section(title, [*blocks, *([Paragraph(note)] if texts else [])])


def _compare_baseline(name: str, key: str, texts: list[dict[str, Any]]) -> Table | None:
    if not any(pick_number(text, key) for text in texts):
        return None
    header = ("Text type", "Bytes", f"{name} tokens", f"{name} ratio", "Ours tokens", "Ours ratio", "Relative diff %")
    rows = []
    for text in texts:
        size, theirs, ours = (pick_number(text, field) for field in ("bytes", key, "ours"))
        saved = None if not theirs or ours is None else 100 * (theirs - ours) / theirs
        rows.append(
            (
                format_value(text.get("text")),
                format_count(size),
                format_count(theirs),
                format_decimal(_divide(size, theirs), 2),
                format_count(ours),
                format_decimal(_divide(size, ours), 2),
                "not recorded" if saved is None else f"{format_signed(saved, 1)} %",
            )
        )
    return Table(header, rows, caption=f"Comparison with {name}")


def _list_ours(texts: list[dict[str, Any]]) -> Table:
    rows: list[tuple[str, ...]] = []
    for text in texts:
        size, ours = pick_number(text, "bytes"), pick_number(text, "ours")
        ratio = format_decimal(_divide(size, ours), 2)
        rows.append((format_value(text.get("text")), format_count(size), format_count(ours), ratio))
    return Table(("Text type", "Bytes", "Ours tokens", "Ours ratio"), rows, caption="Ours alone")


def _divide(dividend: Any, divisor: Any) -> float | None:
    return dividend / divisor if dividend is not None and divisor else None


def build_base_training(results: dict[str, StageResult]) -> Section:
    """The plan, what came of it, and the validation numbers on the way."""
    return build_stage_section("Base model training", results["base"], _describe_base)


def _describe_base(result: StageResult) -> list[Block]:
    metrics = result.metrics
    evaluations = pick_records(metrics, "evaluations")
    estimates = [value for record in evaluations if (value := pick_number(record, "core")) is not None]
    estimate = metrics.get("core_estimate", estimates[-1] if estimates else None)
    parameters, tokens = pick_number(metrics, "parameters"), pick_number(metrics, "train_tokens")
    rows = [
        ("Number of parameters", format_count(metrics.get("parameters"))),
        ("Number of FLOPs per token", format_flops(metrics.get("flops_per_token"))),
        ("Number of steps", format_count(metrics.get("steps"))),
        ("Number of training tokens", format_count(metrics.get("train_tokens"))),
        ("Tokens : parameters ratio", format_decimal(_divide(tokens, parameters))),
        ("Number of processes", format_count(metrics.get("world_size"))),
        ("Device", format_value(metrics.get("device"))),
        (f"Minimum validation bpb{describe_context(metrics)}", format_decimal(metrics.get("val_bpb_min"))),
        (f"Final validation bpb{describe_context(metrics)}", format_decimal(metrics.get("val_bpb_final"))),
        ("CORE metric estimate", _explain_null(metrics, "core_estimate", NO_ESTIMATE) or format_decimal(estimate)),
        ("MFU", _explain_null(metrics, "mfu", NO_PEAK) or format_percent(metrics.get("mfu"))),
        ("Tokens per second", format_count_rounded(metrics.get("tokens_per_second"))),
        ("Total training FLOPs", format_flops(metrics.get("total_flops"))),
        ("Total training time", format_duration(metrics.get("train_seconds"))),
        ("Of it first steps, which may compile", format_duration(metrics.get("first_step_seconds"))),
        ("Peak memory usage", format_bytes(metrics.get("peak_memory_bytes"))),
    ]
    plan = list(flatten_values(metrics.get("plan") or {}, null="none"))
    blocks: list[Block] = [Facts(rows), *compare_prediction(result)]
    blocks.append(Facts(plan or [("plan", "not recorded")], "Plan"))
    if evaluations:
        blocks.append(_list_evaluations(evaluations))
    # The tokenizer's section lists the packages that an embedded text comes from.
    text = [row for row in flatten_values({"dataset": metrics.get("dataset")}) if ".packages." not in row[0]]
    blocks.append(Facts(text, "Training text"))
    shown = {
        "plan",
        "prediction",
        "core_estimate",
        "dataset",
        "parameters",
        "flops_per_token",
        "steps",
        "train_tokens",
        "world_size",
        "device",
        "val_bpb_within_documents",
        "val_bpb_min",
    }
    shown |= {"val_bpb_final", "mfu", "tokens_per_second", "total_flops", "train_seconds", "peak_memory_bytes"}
    shown |= {"first_step_seconds"}
    if "prediction" in metrics:
        shown.add("disk_bytes")
    return [*blocks, *list_others(metrics, shown | {"history", "evaluations", "samples"})]


def _explain_null(metrics: dict[str, Any], key: str, reason: str) -> str | None:
    """The reason for a recorded None: it was measured that there is nothing to measure."""
    return reason if key in metrics and metrics[key] is None else None


def _list_evaluations(evaluations: list[dict[str, Any]]) -> Table:
    rows: list[tuple[str, ...]] = [
        (
            format_count(record.get("step")),
            format_decimal(record.get("val_bpb")),
            format_decimal(record["core"]) if pick_number(record, "core") is not None else "-",
        )
        for record in thin_records(evaluations)
    ]
    return Table(("Step", "Validation bpb", "CORE estimate"), rows, 0, "Evaluations on the way")


def build_base_loss(results: dict[str, StageResult]) -> Section:
    """Bits per byte of the finished model, the curves of its training, and samples."""
    base, evaluated = results["base"], results["base_eval"]
    blocks: list[Block] = []
    if (missing := evaluated.missing) is not None:
        blocks.append(NotRun(missing.reason, missing.how, "Train and validation bpb of the finished model"))
    else:
        blocks += [describe_source(evaluated), *_describe_bpb(evaluated.metrics.get("bpb"))]
    if base.missing is None:
        blocks += [describe_source(base), *_plot_base(base.metrics)]
    samples = pick_records(evaluated.metrics, "samples") or pick_records(base.metrics, "samples")
    blocks.append(build_sample_table(samples) if samples else Paragraph("Samples: not recorded"))
    return Section("Base model loss", blocks)


def _describe_bpb(bpb: Any) -> list[Block]:
    if (not_run := find_not_run(bpb, "Bits per byte")) is not None:
        return [not_run]
    rows = [
        ("train bpb, over whole rows", format_decimal(pick(bpb, "train"))),
        ("val bpb, over whole rows", format_decimal(pick(bpb, "validation"))),
        ("val bpb of whole documents", format_decimal(pick(bpb, "validation_documents"))),
    ]
    known = {"train", "validation", "validation_documents"}
    return [Facts([*rows, *flatten_values({key: v for key, v in pick_named(bpb).items() if key not in known})])]


def _plot_base(metrics: dict[str, Any]) -> list[Block]:
    history, evaluations = pick_records(metrics, "history"), pick_records(metrics, "evaluations")
    panels = {
        "training loss": [collect_series("loss", history, "loss")],
        "validation bpb": [collect_series("validation bpb", evaluations, "val_bpb")],
    }
    return build_figure("base_loss", "Pretraining: training loss and validation bits per byte", panels) or [
        Paragraph("Loss curve: not recorded")
    ]


def build_base_evaluation(results: dict[str, StageResult]) -> Section:
    """CORE and its tasks."""
    return build_stage_section("Base model evaluation", results["base_eval"], _describe_core)


def _describe_core(result: StageResult) -> list[Block]:
    core = result.metrics.get("core")
    others = list_others(result.metrics, {"core", "bpb", "samples", "chatcore", "skills"})
    if (not_run := find_not_run(core, "CORE")) is not None:
        return [not_run, *others]
    limit = pick(core, "max_per_task")
    tasks = pick_named(core, "tasks")
    rows = [
        ("CORE metric", format_measured(pick_number(core, "core"), pick_number(core, "stderr"))),
        ("Tasks", f"{sum(1 for task in tasks.values() if not find_not_run(task)):,} of {len(tasks):,} run"),
        ("Examples per task", "all" if limit is None else f"at most {format_count(limit)}"),
    ]
    blocks: list[Block] = [Facts(rows), build_task_table(tasks), *list_not_run(tasks)]
    note = "CORE is the mean of the centered accuracies: 0 is guessing, 1 is perfect."
    return [*blocks, Paragraph(note), *others]


def build_other_results(results: dict[str, StageResult]) -> list[Section]:
    """Result files of no stage of the pipeline, as they are."""
    return [
        Section(
            f"Other results: {name}",
            [describe_source(result), Facts(list(flatten_values(result.metrics))), *list_settings(result)],
        )
        for name, result in results.items()
        if name not in STAGE_INPUTS
    ]

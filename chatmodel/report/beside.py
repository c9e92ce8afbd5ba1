"""How does a run compare with another one, stage by stage? Their results side by side."""

from collections.abc import Callable, Sequence
from typing import Any

from chatmodel.report.document import Block, Paragraph, Section, Table
from chatmodel.report.formats import (
    format_bytes,
    format_count,
    format_count_rounded,
    format_decimal,
    format_duration,
    format_flops,
    format_percent,
    format_signed,
)
from chatmodel.report.results import StageResult, find_not_run, pick, pick_named, pick_number, pick_records
from chatmodel.report.run_sections import ABSENT, CHATCORE_TASKS
from chatmodel.report.tables import format_accuracy, format_measured, read_accuracy

Results = dict[str, StageResult]
CHAT_STAGES = ("mid", "sft", "rl")
SPLIT_NAMES = {"fwe-train": "train", "fwe-val": "validation"}  # as nanochat calls its own text
# What is said of pretraining: label, stage, path in its metrics, how it is written.
PRETRAINING: tuple[tuple[str, str, tuple[str, ...], Callable[[Any], str]], ...] = (
    ("Vocabulary", "tokenizer", ("vocab_size",), format_count),
    ("Depth", "base", ("plan", "depth"), format_count),
    ("Parameters", "base", ("parameters",), format_count),
    ("FLOPs per token", "base", ("flops_per_token",), format_flops),
    ("Training tokens", "base", ("train_tokens",), format_count),
    ("Total training FLOPs", "base", ("total_flops",), format_flops),
    ("Training time", "base", ("train_seconds",), format_duration),
    ("Tokens per second", "base", ("tokens_per_second",), format_count_rounded),
    ("MFU", "base", ("mfu",), format_percent),
    ("Peak memory, pretraining", "base", ("peak_memory_bytes",), format_bytes),
    ("Peak memory, mid-training", "mid", ("peak_memory_bytes",), format_bytes),
    ("Peak memory, SFT", "sft", ("peak_memory_bytes",), format_bytes),
    ("Peak memory, RL", "rl", ("peak_memory_bytes",), format_bytes),
    ("Train bpb, packed rows of its own text", "base_eval", ("bpb", "train"), format_decimal),
    ("Validation bpb, packed rows of its own text", "base_eval", ("bpb", "validation"), format_decimal),
    ("Validation bpb, single documents", "base_eval", ("bpb", "validation_documents"), format_decimal),
)


def build_beside(results: Results, others: Results, *, folder: str) -> Section:
    """Times, tokenizers, pretraining, CORE and ChatCORE of a run and of another, whose results lie in `folder`."""
    names = ("This run", "The other")
    blocks: list[Block] = [
        Paragraph(
            f"This run: {describe_run(results)}. The other: {describe_run(others)}; its results are in {folder}."
        ),
        _compare_times(results, others, names),
        *_compare_tokenizers(results, others),
        _compare_pretraining(results, others, names),
        *_compare_core(results, others, names),
        *_compare_chatcore(results, others),
        Paragraph(
            "± is the standard error over the examples, where it is known. Bits per byte and tokenizer ratios are of "
            "each run's own text, so they say which text is easier as much as which model is better."
        ),
    ]
    return Section("Beside another run", blocks)


def describe_run(results: Results) -> str:
    """Commit, GPU and day of a run's pretraining, or else of its first finished stage.

    The tokenizer, which comes first, may have been made on another machine.
    """
    for name in ("base", *results):
        result = results.get(name)
        if result is not None and result.record is not None:
            environment = pick(result.record, "environment")
            gpus = [str(pick(gpu, "name")) for gpu in pick_records(environment, "hardware", "gpus")]
            device = f"{len(gpus)}x {gpus[0]}" if gpus else "no GPU"
            day = str(pick(result.record, "started"))[:10]
            commit = pick(environment, "git", "commit") or "unknown"  # a copy of the code without its history
            return f"commit {commit}, {device}, {day}"
    return "nothing finished"


def _compare_times(results: Results, others: Results, names: tuple[str, str]) -> Table:
    rows: list[tuple[str, ...]] = []
    totals = [0.0, 0.0]
    common = [0.0, 0.0]
    for stage in dict.fromkeys((*results, *others)):
        pair = [_seconds(one.get(stage)) for one in (results, others)]
        if pair == [None, None]:
            continue
        rows.append((stage, *_write_pair(pair, format_duration), _ratio(pair)))
        for place, seconds in enumerate(pair):
            totals[place] += seconds or 0.0
            common[place] += (seconds or 0.0) if None not in pair else 0.0
    rows.append(("all stages", *map(format_duration, totals), _ratio(totals)))
    if common != totals:
        rows.append(("stages that both have", *map(format_duration, common), _ratio(common)))
    return Table(("Stage", *names, "Times as long"), rows, caption="Wall clock")


def _seconds(result: StageResult | None) -> float | None:
    return None if result is None else pick_number(result.record, "seconds")


def _ratio(pair: Sequence[float | None]) -> str:
    ours, other = pair
    return format_decimal(other / ours, 1) if ours and other else ABSENT


def _write_pair(pair: Sequence[Any], write: Callable[[Any], str]) -> tuple[str, ...]:
    return tuple(ABSENT if value is None else write(value) for value in pair)


def _compare_tokenizers(results: Results, others: Results) -> list[Table]:
    texts = [_read_texts(one) for one in (results, others)]
    rows: list[tuple[str, ...]] = []
    for name in dict.fromkeys(name for each in texts for name in each):
        pair = [each.get(name, {}) for each in texts]
        cells = [
            _write_pair([_bytes_per_token(text, "ours") for text in pair], lambda value: format_decimal(value, 2))
        ]
        cells += [
            _write_pair([_fewer_tokens(text, key) for text in pair], lambda value: f"{format_signed(value, 1)} %")
            for key in ("gpt2", "gpt4")
        ]
        rows.append((name, *(cell for pair_cells in cells for cell in pair_cells)))
    header = (
        "Text",
        "Ratio, this run",
        "the other",
        "to GPT-2, this run",
        "the other",
        "to GPT-4, this run",
        "the other",
    )
    caption = "Tokenizer: bytes a token, and tokens fewer (+) or more (-) than GPT-2's and GPT-4's on the same text"
    return [Table(header, rows, caption=caption)] if rows else []


def _read_texts(results: Results) -> dict[str, dict[str, Any]]:
    texts = pick_records(results["tokenizer"].metrics, "comparison", "texts") if "tokenizer" in results else []
    return {SPLIT_NAMES.get(str(text.get("text")), str(text.get("text"))): text for text in texts}


def _bytes_per_token(text: dict[str, Any], key: str) -> float | None:
    size, tokens = pick_number(text, "bytes"), pick_number(text, key)
    return size / tokens if size and tokens else None


def _fewer_tokens(text: dict[str, Any], key: str) -> float | None:
    ours, baseline = pick_number(text, "ours"), pick_number(text, key)
    return 100 * (baseline - ours) / baseline if ours is not None and baseline else None


def _compare_pretraining(results: Results, others: Results, names: tuple[str, str]) -> Table:
    rows = []
    for label, stage, keys, write in PRETRAINING:
        pair = [pick_number(one[stage].metrics, *keys) if stage in one else None for one in (results, others)]
        if pair != [None, None]:
            rows.append((label, *_write_pair(pair, write)))
    return Table(("", *names), rows, caption="Pretraining and memory")


def _compare_core(results: Results, others: Results, names: tuple[str, str]) -> list[Block]:
    cores = [one["base_eval"].metrics.get("core") if "base_eval" in one else None for one in (results, others)]
    tasks = [pick_named(core, "tasks") for core in cores]
    rows: list[tuple[str, ...]] = [
        _compare_scores("CORE", [(pick_number(c, "core"), pick_number(c, "stderr")) for c in cores])
    ]
    for name in dict.fromkeys(name for each in tasks for name in each):
        pair = [(pick_number(each, name, "centered"), pick_number(each, name, "centered_stderr")) for each in tasks]
        rows.append(_compare_scores(name, pair))
    caption = "CORE and its tasks, centered: 0 is guessing, 1 is perfect"
    return [Table(("Task", *names, "Difference"), rows, caption=caption)] if any(tasks) else []


def _compare_scores(name: str, pair: Sequence[tuple[Any, Any]]) -> tuple[str, ...]:
    (ours, _), (other, _) = pair
    cells = [ABSENT if value is None else format_measured(value, error) for value, error in pair]
    return (name, *cells, ABSENT if ours is None or other is None else format_signed(ours - other))


def _compare_chatcore(results: Results, others: Results) -> list[Block]:
    scores = {
        (which, stage): one[f"{stage}_eval"].metrics.get("chatcore")
        for stage in CHAT_STAGES
        for which, one in enumerate((results, others))
        if f"{stage}_eval" in one
    }
    columns = [(which, stage) for stage in CHAT_STAGES for which in (0, 1)]
    tasks = {place: pick_named(scores.get(place), "tasks") for place in columns}
    names = dict.fromkeys((*CHATCORE_TASKS, *(name for each in tasks.values() for name in each)))
    rows: list[tuple[str, ...]] = [
        (name, *(_write_task(tasks[place].get(name)) for place in columns)) for name in names
    ]
    means = [_mean_of_others(tasks[place]) for place in columns]
    rows.append(("Mean of the five without SpellingBee, centered", *_write_pair(means, format_decimal)))
    rows.append(
        (
            "ChatCORE",
            *(
                ABSENT
                if (value := pick_number(scores.get(place), "chatcore")) is None
                else format_measured(value, pick_number(scores.get(place), "stderr"))
                for place in columns
            ),
        )
    )
    header = ("Task", *(f"{stage.upper()}, {'this run' if which == 0 else 'the other'}" for which, stage in columns))
    return [Table(header, rows, caption="ChatCORE and its tasks, accuracies")] if any(tasks.values()) else []


def _write_task(task: Any) -> str:
    return (
        ABSENT
        if task is None or (not find_not_run(task) and read_accuracy(task)[0] is None)
        else format_accuracy(task)
    )


def _mean_of_others(tasks: dict[str, Any]) -> float | None:
    """The mean of the centered accuracies of all tasks but SpellingBee; None unless each of the five has one."""
    values = [pick_number(tasks, name, "centered") for name in CHATCORE_TASKS if name != "SpellingBee"]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None

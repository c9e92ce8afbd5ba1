"""The report's sections on the run as a whole: summary, environment, code size."""

from datetime import datetime
from pathlib import Path
from typing import Any

from chatmodel.report.code_size import (
    close_requirements,
    count_constraints,
    measure_parts,
    read_requirements,
    sum_sizes,
)
from chatmodel.report.document import Block, Facts, NotRun, Paragraph, Section, Table
from chatmodel.report.formats import (
    format_count,
    format_decimal,
    format_duration,
    format_money,
    format_time,
    format_value,
)
from chatmodel.report.results import StageResult, find_not_run, pick, pick_named, pick_number
from chatmodel.report.tables import format_accuracy, format_measured, list_not_run

COLUMNS = ("base", "mid", "sft", "rl")
CHATCORE_TASKS = ("ARC-Challenge", "ARC-Easy", "GSM8K", "HumanEval", "MMLU", "SpellingBee")
ABSENT = "-"


def build_summary(results: dict[str, StageResult], code: list[tuple[str, str]], hourly_rate: float | None) -> Section:
    """One table of every metric by stage, then time and cost."""
    evaluations = {column: results[f"{column}_eval"] for column in COLUMNS}
    tasks = {c: pick_named(evaluations[c].metrics, "chatcore", "tasks") for c in COLUMNS}
    skills = {c: pick_named(evaluations[c].metrics, "skills") for c in COLUMNS}
    rows = [_summarise_bpb(results), _summarise_score("CORE", "core", evaluations)]
    # A task that a later version adds has its row after the six known ones.
    names = dict.fromkeys((*CHATCORE_TASKS, *(name for column in COLUMNS for name in tasks[column])))
    rows += [(name, *(_summarise(tasks[column], name) for column in COLUMNS)) for name in names]
    rows.append(_summarise_score("ChatCORE", "chatcore", evaluations))
    taught = dict.fromkeys(name for column in COLUMNS for name in skills[column])
    rows += [(f"skill: {name}", *(_summarise(skills[column], name) for column in COLUMNS)) for name in taught]
    rows += _summarise_pass(results["rl"].metrics)
    header = ("Metric", *(column.upper() for column in COLUMNS))
    note = (
        f"Values are ± standard errors; {ABSENT} is not measured. Validation bpb is that of each stage's own text, so "
        "only runs can be compared by it, not stages."
    )
    blocks: list[Block] = [Table(header, rows), Paragraph(note), *_list_missing(evaluations)]
    return Section("Summary", [*blocks, *_describe_time(results, hourly_rate), Facts(code, "Code")])


def _summarise(measured: dict[str, Any], name: str) -> str:
    return format_accuracy(measured[name], with_n=True) if name in measured else ABSENT


def _summarise_score(label: str, key: str, evaluations: dict[str, StageResult]) -> tuple[str, ...]:
    cells = []
    for column in COLUMNS:
        score = pick(evaluations[column].metrics, key)
        value = pick(score, key)
        parts = (score, value, *(pick_named(score, "tasks").values() if value is None else ()))
        if any(find_not_run(part) for part in parts):
            cells.append("not run")
        elif pick_number(score, key) is None:
            cells.append(ABSENT)
        else:
            cells.append(format_measured(pick_number(score, key), pick_number(score, "stderr")))
    return (label, *cells)


def _summarise_bpb(results: dict[str, StageResult]) -> tuple[str, ...]:
    final = pick_number(results["base_eval"].metrics, "bpb", "validation")
    values = {
        "base": pick_number(results["base"].metrics, "val_bpb_final") if final is None else final,
        **{stage: pick_number(results[stage].metrics, "validation_bpb") for stage in ("mid", "sft")},
    }
    return (
        "Validation bpb (each stage on its own text)",
        *(ABSENT if values.get(column) is None else format_decimal(values[column]) for column in COLUMNS),
    )


def _summarise_pass(metrics: dict[str, Any]) -> list[tuple[str, ...]]:
    measured = pick_named(metrics, "pass_at_1")
    if not measured:
        return []
    before, after = (_summarise(measured, key) for key in ("before", "after"))
    return [(f"RL pass@1 ({format_value(metrics.get('task'))})", ABSENT, ABSENT, before, after)]


def _list_missing(evaluations: dict[str, StageResult]) -> list[Block]:
    """What the table's `not run` cells mean, once per reason, and the stages with no numbers at all."""
    stages: dict[tuple[str, str, str | None], list[str]] = {}
    for column, evaluation in evaluations.items():
        metrics = evaluation.metrics
        chatcore, skills = metrics.get("chatcore"), metrics.get("skills")
        parts = {
            "CORE": metrics.get("core"),
            "ChatCORE": chatcore if find_not_run(chatcore) else pick(chatcore, "chatcore"),
            **pick_named(chatcore, "tasks"),
            "taught skills": skills,
            **pick_named(skills),
        }
        for missing in list_not_run(parts):
            stages.setdefault((missing.what, missing.reason, missing.how), []).append(column.upper())
    blocks: list[Block] = [
        NotRun(reason, how, f"{what} ({', '.join(columns)})") for (what, reason, how), columns in stages.items()
    ]
    if absent := [evaluation.stage for evaluation in evaluations.values() if evaluation.missing is not None]:
        blocks.append(Paragraph(f"Not evaluated yet: {', '.join(absent)} (see their sections)."))
    return blocks


def _describe_time(results: dict[str, StageResult], hourly_rate: float | None) -> list[Block]:
    finished = {name: result.record for name, result in results.items() if result.record is not None}
    spent = {name: pick_number(record, "seconds") for name, record in finished.items()}
    total = sum(seconds for seconds in spent.values() if seconds is not None)
    facts = [("Total wall clock time (sum of the stages)", format_duration(total))]
    if (span := _measure_span(list(finished.values()))) is not None:
        facts.append(("From first start to last finish", format_duration(span)))
    if hourly_rate is not None:
        cost = format_money(total / 3600 * hourly_rate)
        facts.append((f"Cost at {format_money(hourly_rate)} per hour", cost))
    rows = []
    for name, record in finished.items():
        times = (format_time(pick(record, key)) for key in ("started", "finished"))
        row = (name, format_value(pick(record, "id")), *times, format_duration(spent[name]))
        seconds = spent[name]
        price = () if hourly_rate is None else ("" if seconds is None else format_money(seconds / 3600 * hourly_rate),)
        rows.append((*row, *price))
    header = ("Stage", "Id", "Started", "Finished", "Time", *(() if hourly_rate is None else ("Cost",)))
    return [Facts(facts, "Time"), Table(header, rows, 4)]


def _measure_span(records: list[dict[str, Any]]) -> float | None:
    """Seconds from the first stage's start to the last one's finish; None when no time can be read."""
    try:
        starts = [datetime.fromisoformat(record["started"]) for record in records]
        ends = [datetime.fromisoformat(record["finished"]) for record in records]
        return (max(ends) - min(starts)).total_seconds()
    except (KeyError, TypeError, ValueError):
        return None


def build_environment(results: dict[str, StageResult], hourly_rate: float | None) -> Section:
    """Git, hardware and software of the stages; a value that differs between stages names them."""
    blocks: list[Block] = []
    for title, key in (("Git information", "git"), ("Hardware", "hardware"), ("Software", "software")):
        values: dict[str, dict[str, list[str]]] = {}
        for name, result in results.items():
            for fact, value in _describe_facts(pick(result.record, "environment", key)):
                values.setdefault(fact, {}).setdefault(value, []).append(name)
        rows = [(fact, _join_differing(by_value)) for fact, by_value in values.items()]
        if key == "hardware" and hourly_rate is not None:
            rows.append(("hourly rate", f"{format_money(hourly_rate)} / hour"))
        blocks.append(Facts(rows or [(title, "not recorded")], title))
    return Section("Environment", blocks)


def build_commands(results: dict[str, StageResult]) -> Section:
    """The command of each finished stage, in the order of the pipeline."""
    rows = [(name, result.command) for name, result in results.items() if result.command is not None]
    return Section("Commands", [Facts([(name, command) for name, command in rows if command])])


def _describe_facts(facts: Any) -> list[tuple[str, str]]:
    if not isinstance(facts, dict):
        return []
    rows = []
    for key, value in facts.items():
        if key == "gpus":
            rows.append(("GPUs", _describe_gpus(value)))
        elif key == "memory_gib":
            rows.append(("memory", f"{format_decimal(value, 1)} GiB"))
        elif key == "commit" and facts.get("dirty"):
            rows.append((key, f"{format_value(value)} (dirty)"))
        elif key != "dirty":
            text = "none" if value is None else format_value(value)
            rows.append((key.replace("_", " "), text))
    return rows


def _describe_gpus(gpus: Any) -> str:
    if not isinstance(gpus, list) or not gpus:
        return "none"
    names = [f"{pick(gpu, 'name')} ({format_decimal(pick(gpu, 'memory_gib'), 1)} GiB)" for gpu in gpus]
    return ", ".join(f"{names.count(name)}x {name}" for name in dict.fromkeys(names))


def _join_differing(by_value: dict[str, list[str]]) -> str:
    if len(by_value) == 1:
        return next(iter(by_value))
    return "; ".join(f"{value} ({', '.join(stages)})" for value, stages in by_value.items())


def describe_code(root: Path) -> list[tuple[str, str]]:
    """Totals of the code and how many packages it needs."""
    total = sum_sizes(measure_parts(root).values())
    requirements = read_requirements(root)
    facts = [
        ("Characters", format_count(total.characters)),
        ("Lines", format_count(total.lines)),
        ("Files", format_count(total.files)),
        ("Tokens (approx)", format_count(total.tokens)),
        ("Dependencies (direct)", format_count(len(requirements))),
        ("Dependencies (installed, with their own)", format_count(len(close_requirements(requirements)))),
    ]
    constraints = count_constraints(root)
    return (
        facts if constraints is None else [*facts, ("Packages pinned in constraints.txt", format_count(constraints))]
    )


def build_code_size(root: Path, code: list[tuple[str, str]]) -> Section:
    """Bloat: the code as it lies there when the report is made, in total and by folder."""
    rows: list[tuple[str, ...]] = [
        (name, format_count(size.files), format_count(size.lines), format_count(size.characters))
        for name, size in measure_parts(root).items()
    ]
    table = Table(("Folder", "Files", "Lines", "Characters"), rows)
    return Section("Code size", [Facts(code), table])

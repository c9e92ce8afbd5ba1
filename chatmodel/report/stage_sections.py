"""What every stage's section has: its source, its settings, and everything recorded that no table shows."""

from collections.abc import Callable, Iterable
from typing import Any

from chatmodel.report.document import Block, Facts, Figure, Panel, Section, Series, Source
from chatmodel.report.formats import format_duration, format_time, format_value
from chatmodel.report.results import StageResult, flatten_values, pick

MAX_TABLE_EVALUATIONS = 12


def build_stage_section(title: str, result: StageResult, build: Callable[[StageResult], list[Block]]) -> Section:
    """Source, the blocks of `build`, settings; or why there are no numbers and how to get them."""
    if (missing := result.missing) is not None:
        return Section(title, [missing])
    return Section(title, [describe_source(result), *build(result), *list_settings(result)])


def describe_source(result: StageResult) -> Source:
    """File, id, times and command of a finished stage."""
    record = result.record
    details = (
        f"id {format_value(pick(record, 'id'))}, finished {format_time(pick(record, 'finished'))}, "
        f"took {format_duration(pick(record, 'seconds'))}"
    )
    return Source(result.file, details, result.command)


def list_settings(result: StageResult) -> list[Block]:
    """What the stage was asked for (YAML and command line; the rest are defaults)."""
    rows = list(flatten_values(pick(result.record, "settings") or {}, null="none"))
    return [Facts(rows, "Settings asked for")] if rows else []


def list_others(metrics: dict[str, Any], shown: Iterable[str]) -> list[Block]:
    """Recorded metrics that the section does not show otherwise, under their own keys."""
    shown = set(shown)
    rows = list(flatten_values({key: value for key, value in metrics.items() if key not in shown}))
    return [Facts(rows, "Also recorded")] if rows else []


def build_figure(name: str, caption: str, panels: dict[str, list[Series]]) -> list[Block]:
    """A figure of the panels that have points; no block at all when none has."""
    filled = {title: [one for one in series if one.points] for title, series in panels.items()}
    drawn = [Panel(title, series) for title, series in filled.items() if series]
    return [Figure(name, caption, drawn)] if drawn else []


def thin_records(records: list[dict[str, Any]], limit: int = MAX_TABLE_EVALUATIONS) -> list[dict[str, Any]]:
    """At most `limit` records, evenly chosen, with the first and the last."""
    if len(records) <= limit:
        return records
    return [records[round(i * (len(records) - 1) / (limit - 1))] for i in range(limit)]

"""Which differences between two evaluated models exceed the noise? Result files compared, example by example."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from chatmodel.evaluation.statistics import (
    Values,
    combine_seeds,
    find_interval,
    holm_adjust,
    join_shared,
    mcnemar_p_value,
    normal_p_value,
    resample_sum,
    sum_stderr,
    unpack_decisions,
)
from chatmodel.runtime import UserError, read_json

SIGNIFICANT = 0.05
# The parts of an evaluation's metrics that hold tasks, and where.
BENCHMARKS = {"core": "CORE", "chatcore": "ChatCORE"}


@dataclass(frozen=True)
class Measured:
    """One task of one system: `values` is (n,), the share of its seeds that are right on each example.

    `scores` is each seed's accuracy. Where not every seed recorded its decisions, `values` are sorted and the task
    cannot be paired.
    """

    values: Values
    scores: tuple[float, ...]
    baseline: float
    has_decisions: bool


@dataclass(frozen=True)
class System:
    """A model, evaluated once or with several training seeds: its tasks by part, and numbers without tasks."""

    label: str
    parts: dict[str, dict[str, Measured]]
    numbers: dict[str, list[float]]


@dataclass(frozen=True)
class Difference:
    """Second minus first, its standard error and p-value; `adjusted` is Holm's, over the tasks of its part."""

    name: str
    first: float
    second: float
    stderr: float
    p_value: float
    paired: bool
    adjusted: float | None = None
    interval: tuple[float, float] | None = None

    @property
    def value(self) -> float:
        """Above zero where the second is better."""
        return self.second - self.first

    @property
    def exceeds_noise(self) -> bool:
        """Whether chance alone would give such a difference less than once in twenty times."""
        return (self.p_value if self.adjusted is None else self.adjusted) < SIGNIFICANT


@dataclass(frozen=True)
class PartComparison:
    """One part of the evaluation: the mean centered accuracy over the tasks both have, then the tasks.

    `systems` is that mean for each of the two, see `combine_seeds`.
    """

    name: str
    overall: Difference | None
    tasks: tuple[Difference, ...]
    left_out: tuple[str, ...]
    systems: tuple[dict[str, float | int], ...] = ()


def load_system(place: str) -> System:
    """Results of one system: a result file, a run folder, or several of either with commas between, one per seed.

    Raises:
        UserError: a place is missing or holds no evaluation, or the seeds are of different evaluations.
    """
    seeds = [dict(_read_place(Path(name))) for name in place.split(",") if name]
    if not seeds or any(not seed for seed in seeds):
        raise UserError(f"{place} holds no evaluation; give a file that recipes/eval.py wrote, or a run folder")
    parts: dict[str, dict[str, list[dict[str, Any]]]] = {}
    numbers: dict[str, list[float]] = {}
    for seed in seeds:
        for prefix, metrics in seed.items():
            for name, tasks in _find_parts(metrics):
                for label, task in tasks.items():
                    parts.setdefault(prefix + name, {}).setdefault(label, []).append(task)
            for name, value in _find_numbers(metrics):
                numbers.setdefault(prefix + name, []).append(value)
    merged = {
        name: {label: _merge_seeds(found) for label, found in tasks.items() if len(found) == len(seeds)}
        for name, tasks in parts.items()
    }
    return System(place, merged, {name: found for name, found in numbers.items() if len(found) == len(seeds)})


def _read_place(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name of the stage, metrics) of each evaluation; a file of its own has no name, so that stages compare."""
    if path.is_dir():
        for file in sorted((path / "results").glob("*_eval.json")):
            yield f"{file.stem.removesuffix('_eval')} ", read_json(file)["metrics"]
    else:
        content = read_json(path)
        if isinstance(content, dict) and isinstance(content.get("metrics"), dict):
            yield "", content["metrics"]


def _find_parts(metrics: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, dict[str, Any]]]]:
    for key, name in BENCHMARKS.items():
        tasks = (metrics.get(key) or {}).get("tasks", {})
        yield name, {label: task for label, task in tasks.items() if "accuracy" in task}
    skills = metrics.get("skills") or {}
    yield "skills", {k: task for k, task in skills.items() if isinstance(task, dict) and "accuracy" in task}


def _find_numbers(metrics: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in (metrics.get("bpb") or {}).items():
        if isinstance(value, float):
            yield f"bits per byte, {name}", value


def _merge_seeds(tasks: Sequence[Mapping[str, Any]]) -> Measured:
    n = tasks[0]["n"]
    if any(task["n"] != n for task in tasks):
        raise UserError("the seeds of one system were evaluated on different numbers of examples; evaluate them alike")
    has_decisions = all("decisions" in task for task in tasks)
    rows = [_read_decisions(task) for task in tasks]
    baseline = tasks[0].get("baseline", _derive_baseline(tasks[0]))
    scores = tuple(float(task["accuracy"]) for task in tasks)
    return Measured(np.mean(rows, axis=0), scores, baseline, has_decisions)


def _read_decisions(task: Mapping[str, Any]) -> Values:
    """(n,) ones and zeros; without decisions the ones come first, which is the right number in no known order."""
    if "decisions" in task:
        return np.asarray(unpack_decisions(task["decisions"], task["n"]), dtype=np.float64)
    return (np.arange(task["n"]) < round(task["accuracy"] * task["n"])).astype(np.float64)


def _derive_baseline(task: Mapping[str, Any]) -> float:
    accuracy, centered = task["accuracy"], task.get("centered", task["accuracy"])
    return 0.0 if centered == 1.0 else (accuracy - centered) / (1.0 - centered)


def compare_systems(first: System, second: System) -> list[PartComparison]:
    """Each part that both have.

    Raises:
        UserError: they have nothing in common.
    """
    names = [name for name in first.parts if name in second.parts and first.parts[name] and second.parts[name]]
    if not names and not first.numbers.keys() & second.numbers.keys():
        raise UserError(f"{first.label} and {second.label} have no evaluation in common; compare two of the same kind")
    return [_compare_part(name, first.parts[name], second.parts[name]) for name in names]


def _compare_part(name: str, first: Mapping[str, Measured], second: Mapping[str, Measured]) -> PartComparison:
    labels = [label for label in first if label in second]
    tasks = [compare_task(label, first[label], second[label]) for label in labels]
    adjusted = holm_adjust([task.p_value for task in tasks])
    tasks = [_with(task, adjusted=value) for task, value in zip(tasks, adjusted, strict=True)]
    left_out = tuple(sorted(first.keys() ^ second.keys()))
    if not labels or name.endswith("skills"):
        return PartComparison(name, None, tuple(tasks), left_out)
    one, other = ({label: tasks_of[label] for label in labels} for tasks_of in (first, second))
    overall = compare_means(name, list(one.values()), list(other.values()), labels)
    return PartComparison(name, overall, tuple(tasks), left_out, (summarize_system(one), summarize_system(other)))


def summarize_system(tasks: Mapping[str, Measured]) -> dict[str, float | int]:
    """Mean centered accuracy over tasks and seeds, with the noise of both examples and seeds (`combine_seeds`)."""
    parts = {label: task.values / (1.0 - task.baseline) / len(tasks) for label, task in tasks.items()}
    return combine_seeds(_mean_centered(list(tasks.values())), sum_stderr(join_shared(parts)))


def _with(difference: Difference, **changes: Any) -> Difference:
    return Difference(**{**difference.__dict__, **changes})


def is_paired(first: Measured, second: Measured) -> bool:
    """Whether both answered the same examples, one by one known."""
    return first.has_decisions and second.has_decisions and len(first.values) == len(second.values)


def compare_task(name: str, first: Measured, second: Measured) -> Difference:
    """Accuracies; exactly (McNemar) where both are single and paired, else by a normal approximation."""
    paired = is_paired(first, second)
    stderr = math.hypot(sum_stderr(_difference_blocks(first, second)), _seed_error(first.scores, second.scores))
    means = float(first.values.mean()), float(second.values.mean())
    if paired and len(first.scores) == len(second.scores) == 1:
        won = int((second.values > first.values).sum())
        lost = int((second.values < first.values).sum())
        p_value = mcnemar_p_value(lost, won)
    else:
        p_value = normal_p_value(means[1] - means[0], stderr if paired else _pool_stderr(first, second))
    return Difference(name, *means, stderr, p_value, paired)


def _pool_stderr(first: Measured, second: Measured) -> float:
    """Standard error of the difference if both were equally good: what a test of two separate samples wants."""
    both = np.concatenate([first.values, second.values])
    examples = float(np.var(both)) * (1 / len(first.values) + 1 / len(second.values))
    return math.hypot(math.sqrt(examples), _seed_error(first.scores, second.scores))


def _difference_blocks(first: Measured, second: Measured, scale: float = 1.0) -> list[Values]:
    if is_paired(first, second):
        return [(second.values - first.values) * scale]
    return [-first.values * scale, second.values * scale]


def _seed_error(*systems: Sequence[float]) -> float:
    """What the training seeds add to the standard error of a difference of means; nothing is known of a lone one."""
    return math.sqrt(sum(float(np.var(scores, ddof=1)) / len(scores) for scores in systems if len(scores) > 1))


def compare_means(
    name: str, first: Sequence[Measured], second: Sequence[Measured], labels: Sequence[str]
) -> Difference:
    """Mean centered accuracies, by bootstrap over the examples of all tasks; and over seeds where there are some."""
    pairs = list(zip(first, second, strict=True))
    parts: dict[str, Values] = {}
    loose: list[Values] = []
    for label, (one, other) in zip(labels, pairs, strict=True):
        blocks = _difference_blocks(one, other, 1.0 / (1.0 - one.baseline) / len(labels))
        if len(blocks) == 1:
            parts[label] = blocks[0]
        else:
            loose += blocks
    blocks = [*join_shared(parts), *loose]
    scores = _mean_centered(first), _mean_centered(second)
    seed_error = _seed_error(*scores)
    stderr = math.hypot(sum_stderr(blocks), seed_error)
    draws = resample_sum(blocks)
    draws = draws + np.random.default_rng(1).normal(0.0, seed_error, len(draws))
    low, high = find_interval(draws)
    means = float(np.mean(scores[0])), float(np.mean(scores[1]))
    p_value = normal_p_value(means[1] - means[0], stderr)
    return Difference(name, *means, stderr, p_value, all(is_paired(*pair) for pair in pairs), interval=(low, high))


def _mean_centered(tasks: Sequence[Measured]) -> list[float]:
    """Mean centered accuracy of each seed."""
    seeds = zip(*(task.scores for task in tasks), strict=True)
    baselines = [task.baseline for task in tasks]
    return [
        float(np.mean([(score - b) / (1.0 - b) for score, b in zip(scores, baselines, strict=True)]))
        for scores in seeds
    ]


def render_comparison(first: System, second: System) -> str:
    """The comparison as Markdown: a table for each part, what its columns mean, and what was not compared."""
    parts = compare_systems(first, second)
    lines = [f"A = {first.label}", f"B = {second.label}", ""]
    for part in parts:
        lines += [f"## {part.name}", "", *_render_table(_list_rows(part)), ""]
        for letter, system in zip("AB", part.systems, strict=False):
            lines.append(
                f"{letter}: {part.name} {system['mean']:.4f} ± {system['stderr']:.4f}{_name_spread(system)}  "
            )
        lines += [""] if part.systems else []
        if part.left_out:
            lines += [f"Only one of the two has: {', '.join(part.left_out)}.", ""]
    numbers = [name for name in first.numbers if name in second.numbers]
    if numbers:
        lines += ["## Numbers without examples", "", *_render_table(_list_numbers(first, second, numbers)), ""]
    return "\n".join([*lines, *_list_notes(first, second, parts)])


def _name_spread(system: Mapping[str, float | int]) -> str:
    if system["num_seeds"] == 1:
        return ", one seed"
    return f", {system['num_seeds']} seeds with a standard deviation of {system['spread']:.4f} between them"


def _list_rows(part: PartComparison) -> Iterator[tuple[str, ...]]:
    yield ("task", "A", "B", "B - A", "± se", "p", "p, Holm", "pairs", "verdict")
    for row in (*([part.overall] if part.overall else []), *part.tasks):
        adjusted = "" if row.adjusted is None else f"{row.adjusted:.3f}"
        verdict = ("B is better" if row.value > 0 else "A is better") if row.exceeds_noise else "within the noise"
        name = row.name
        if row.interval is not None:
            name = f"**{row.name}** (95 %: {row.interval[0]:+.4f} to {row.interval[1]:+.4f})"
        numbers = (f"{row.first:.4f}", f"{row.second:.4f}", f"{row.value:+.4f}", f"{row.stderr:.4f}")
        yield (name, *numbers, f"{row.p_value:.3f}", adjusted, "yes" if row.paired else "no", verdict)


def _list_numbers(first: System, second: System, names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    yield ("number", "A", "B", "B - A", "± se of the seeds", "verdict")
    for name in names:
        one, other = first.numbers[name], second.numbers[name]
        difference = float(np.mean(other) - np.mean(one))
        texts = (name, f"{np.mean(one):.4f}", f"{np.mean(other):.4f}", f"{difference:+.4f}")
        if len(one) < 2 or len(other) < 2:
            yield (*texts, "not known", "needs several seeds of both")
            continue
        stderr = _seed_error(one, other)
        better = "B is better" if difference < 0 else "A is better"
        exceeds = normal_p_value(difference, stderr) < SIGNIFICANT
        yield (*texts, f"{stderr:.4f}", better if exceeds else "within the noise")


def _render_table(rows: Iterator[tuple[str, ...]]) -> list[str]:
    cells = list(rows)
    widths = [max(map(len, column)) for column in zip_longest(*cells, fillvalue="")]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def _list_notes(first: System, second: System, parts: Sequence[PartComparison]) -> Iterator[str]:
    tasks = [task for part in parts for task in part.tasks]
    if tasks:
        yield (
            f"se and p: noise from the draw of the examples. Of {len(tasks)} tasks compared at p < {SIGNIFICANT}, "
            f"{len(tasks) * SIGNIFICANT:.1f} would differ by chance; Holm's p allows for that, and verdicts use it."
        )
    if any(not task.paired for task in tasks):
        yield (
            "pairs = no: a file keeps no decisions per example, or the examples differ in number; the test is then "
            "much weaker than a paired one. Evaluate both again, on the same examples."
        )
    alone = [system for system in (first, second) if "," not in system.label]
    if alone:
        yield (
            "One training seed says that two models differ, not that two recipes do: give the results of several "
            "seeds with commas between them to count the seeds' noise too."
        )

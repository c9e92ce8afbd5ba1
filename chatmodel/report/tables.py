"""Tables that several sections share: accuracies with standard errors, tasks, skills, mixtures, samples."""

import math
from collections.abc import Iterable
from typing import Any

from chatmodel.report.document import NotRun, Table, Transcript
from chatmodel.report.formats import (
    NOT_RECORDED,
    clip_text,
    format_count,
    format_decimal,
    format_duration,
    format_signed,
    format_value,
)
from chatmodel.report.results import find_not_run, pick, pick_number, pick_records

MAX_SAMPLE_CHARS = 600


def read_accuracy(measured: Any) -> tuple[float | None, float | None, int | None]:
    """(accuracy, standard error, number of examples); None for what is neither recorded nor implied.

    The accuracy is correct / n and its standard error sqrt(p (1 - p) / n) where only those were recorded.
    """
    n = pick_number(measured, "n")
    accuracy = pick_number(measured, "accuracy")
    correct = pick_number(measured, "correct")
    if accuracy is None and correct is not None and n:
        accuracy = correct / n
    error = pick_number(measured, "stderr")
    if error is None and n and accuracy is not None and 0 <= accuracy <= 1:
        error = math.sqrt(accuracy * (1 - accuracy) / n)
    return accuracy, error, n


def format_measured(value: Any, error: Any, n: Any = None) -> str:
    """`0.2660 ± 0.0091 (n = 2,376)`, without the parts that are not known."""
    if value is None:
        return NOT_RECORDED
    text = format_decimal(value)
    if error is not None:
        text += f" ± {format_decimal(error)}"
    return text if n is None else f"{text} (n = {format_count(n)})"


def format_accuracy(measured: Any, *, with_n: bool = False) -> str:
    """An accuracy with its standard error; `not run` or `not recorded` where there is none."""
    if find_not_run(measured):
        return "not run"
    accuracy, error, n = read_accuracy(measured)
    return format_measured(accuracy, error, n if with_n else None)


def build_task_table(tasks: dict[str, Any], *, header: str = "Task") -> Table:
    """Benchmark tasks: accuracy ± standard error, centred accuracy (0 = chance, 1 = perfect), n, time."""
    rows = [
        (name, "not run", "", "", "")
        if find_not_run(task)
        else (
            name,
            format_accuracy(task),
            format_decimal(pick(task, "centered")),
            format_count(read_accuracy(task)[2]),
            format_duration(pick(task, "seconds")),
        )
        for name, task in tasks.items()
    ]
    return Table((header, "Accuracy ± stderr", "Centered", "n", "Time"), rows)


def build_skill_table(skills: dict[str, Any]) -> Table:
    """Taught skills beside what guessing gets, and how likely guessing is to do as well."""
    rows = []
    for name, skill in skills.items():
        if find_not_run(skill):
            rows.append((name, "not run", "", "", "", ""))
            continue
        accuracy, _, n = read_accuracy(skill)
        chance = pick_number(skill, "chance")
        above = None if accuracy is None or chance is None else accuracy - chance
        rows.append(
            (
                name,
                format_accuracy(skill),
                f"{format_count(pick(skill, 'correct'))} / {format_count(n)}",
                format_decimal(chance),
                format_signed(above),
                format_probability(probability_by_chance(pick_number(skill, "correct"), n, chance)),
            )
        )
    return Table(("Skill", "Accuracy ± stderr", "Correct / n", "Chance", "Above chance", "p by chance"), rows)


def probability_by_chance(correct: float | None, n: float | None, chance: float | None) -> float | None:
    """Binomial probability of `correct` or more right answers out of `n` by guessing; None when it is unknown."""
    if correct is None or not n or chance is None or not 0 <= chance <= 1 or not 0 <= correct <= n:
        return None
    k, n = int(correct), int(n)
    if k == 0 or chance == 1:
        return 1.0
    if chance == 0:
        return 0.0
    # In logarithms: the binomial coefficients of a thousand examples overflow a float.
    logs = [
        math.lgamma(n + 1)
        - math.lgamma(i + 1)
        - math.lgamma(n - i + 1)
        + i * math.log(chance)
        + (n - i) * math.log1p(-chance)
        for i in range(k, n + 1)
    ]
    return min(1.0, math.fsum(math.exp(value) for value in logs))


def format_probability(value: float | None) -> str:
    """Three decimals, or a bound when it is smaller than they can show."""
    if value is None:
        return NOT_RECORDED
    for bound, text in ((1e-9, "< 1e-9"), (1e-6, "< 1e-6"), (1e-3, "< 0.001")):
        if value < bound:
            return text
    return f"{value:.3f}"


def list_not_run(measured: dict[str, Any]) -> list[NotRun]:
    """One block per reason, naming everything that was not run for it."""
    names: dict[tuple[str, str | None], list[str]] = {}
    for name, value in measured.items():
        if (missing := find_not_run(value)) is not None:
            names.setdefault((missing.reason, missing.how), []).append(name)
    return [NotRun(reason, how, ", ".join(group)) for (reason, how), group in names.items()]


def build_mixture_table(mixture: list[dict[str, Any]]) -> Table:
    """What a chat stage was trained on, with a total of each count, also of those that only some data sets have."""
    keys = ["rows", "tokens", "trained_tokens", "skipped"]
    keys += sorted({key for part in mixture for key in part if pick_number(part, key) is not None} - {*keys})
    rows = [(format_value(part.get("name")), *(format_count(part.get(key)) for key in keys)) for part in mixture]
    if len(mixture) > 1:
        counts = [[number for part in mixture if (number := pick_number(part, key)) is not None] for key in keys]
        rows.append(("total", *(format_count(sum(column) if column else None) for column in counts)))
    return Table(("Data set", *(key.capitalize().replace("_", " ") for key in keys)), rows)


def build_sample_table(samples: list[dict[str, Any]]) -> Table:
    """What the model made of some prompts."""
    rows = [
        (str(i), *(clip_text(write_content(sample.get(key)), MAX_SAMPLE_CHARS) for key in ("prompt", "completion")))
        for i, sample in enumerate(samples)
    ]
    return Table(("Sample", "Prompt", "Completion"), rows, num_text_columns=3)


def build_transcripts(samples: list[dict[str, Any]], *, caption: str) -> list[Transcript]:
    """Sample conversations, turn by turn."""
    found = []
    for i, sample in enumerate(samples):
        turns = [(str(m.get("role", "?")), clip_sample(m.get("content"))) for m in pick_records(sample, "messages")]
        if turns:
            found.append(Transcript(f"{caption} {i + 1}", turns))
    return found


def clip_sample(content: Any) -> str:
    """The text of a message, no longer than a reader wants to see."""
    return clip_text(write_content(content), 4 * MAX_SAMPLE_CHARS)


def write_content(content: Any) -> str:
    """A message's content, a list of messages or of parts, or plain text, as text."""
    if content is None:
        return NOT_RECORDED
    if isinstance(content, list):
        return "".join(_write_parts(content))
    return str(content)


def _write_parts(parts: list[Any]) -> Iterable[str]:
    for part in parts:
        if not isinstance(part, dict):
            yield str(part)
        elif "role" in part:
            yield f"{part['role']}: {write_content(part.get('content'))}\n"
        elif part.get("type", "text") == "text":
            yield str(part.get("text", ""))
        else:
            yield f"⟨{part['type']}: {part.get('text', '')}⟩"

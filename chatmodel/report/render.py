"""Turn a run's `results/*.json` into report.md, report.html and plots."""

import logging
import math
import shutil
from datetime import datetime
from pathlib import Path

from chatmodel.report.as_html import write_html
from chatmodel.report.as_markdown import write_markdown
from chatmodel.report.beside import build_beside
from chatmodel.report.chat_sections import build_chat_evaluation, build_midtraining, build_sft
from chatmodel.report.code_size import find_repository
from chatmodel.report.document import Document, Paragraph, Section
from chatmodel.report.plots import draw_figure
from chatmodel.report.pretraining_sections import (
    build_base_evaluation,
    build_base_loss,
    build_base_training,
    build_other_results,
    build_tokenizer_evaluation,
    build_tokenizer_training,
)
from chatmodel.report.results import StageResult, load_results, shorten_paths
from chatmodel.report.rl_section import build_rl
from chatmodel.report.run_sections import (
    build_code_size,
    build_commands,
    build_environment,
    build_summary,
    describe_code,
)
from chatmodel.runs import Run
from chatmodel.runtime import UserError

logger = logging.getLogger("chatmodel")


def render_report(
    run: Run,
    *,
    hourly_rate: float | None = None,
    title: str = "chatmodel training report",
    repository: Path | None = None,
    beside: Run | None = None,
) -> tuple[Path, Path]:
    """Write `report.md` (plots in `plots/`) and the self-contained `report.html` into the run; return both paths.

    What a person has to say of the run, for example what went wrong, is read from its `notes.md`.

    Args:
        hourly_rate: US dollars per hour of the machine; without it the report says nothing of cost.
        repository: folder whose code is counted, by default the checkout this package lies in.
        beside: another run, whose numbers are laid beside this one's.

    Raises:
        UserError: a run has no results, a result file is damaged, or the rate is negative.
    """
    if hourly_rate is not None and not (math.isfinite(hourly_rate) and hourly_rate >= 0):
        raise UserError(f"hourly_rate is {hourly_rate}; give US dollars per hour, 0 or more")
    document = build_document(load_results(run), hourly_rate, title, repository or find_repository(), beside)
    document.sections[1:1] = read_notes(run)
    plots = {}
    for figure in document.figures:
        path = run.folder("plots") / f"{figure.name}.svg"
        draw_figure(figure, path)
        plots[figure.name] = path.read_bytes()
    written = run.folder("report.md"), run.folder("report.html")
    written[0].write_text(write_markdown(document), encoding="utf-8")
    written[1].write_text(write_html(document, plots), encoding="utf-8")
    logger.info("report: %d sections, %d plots", len(document.sections), len(plots))
    return written


def read_notes(run: Run) -> list[Section]:
    """What a person wrote into the run's `notes.md`, paragraphs between empty lines; no section without it."""
    path = run.folder("notes.md")
    if not path.exists():
        return []
    paragraphs = [" ".join(part.split()) for part in path.read_text(encoding="utf-8").split("\n\n")]
    return [Section("Notes", [Paragraph(text) for text in paragraphs if text])]


def publish_report(run: Run, folder: Path) -> None:
    """Copy a run's report.md, its plots and the results it comes from, to be kept without the models.

    Raises:
        UserError: the folder holds another run's results.
    """
    kept = {path.name for path in (folder / "results").glob("*.json")}
    results = sorted(run.folder("results").glob("*.json"))
    if kept - {path.name for path in results}:
        raise UserError(f"{folder} holds results that are not of {run.run_dir}; give a new folder, or empty that one")
    for path in [run.folder("report.md"), *results, *sorted(run.folder("plots").glob("*.svg"))]:
        target = folder / path.relative_to(run.run_dir)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def build_document(
    results: dict[str, StageResult],
    hourly_rate: float | None,
    title: str,
    repository: Path,
    beside: Run | None = None,
) -> Document:
    """Every section, in the order of the pipeline after the summary."""
    code = describe_code(repository)
    sections: list[Section] = [
        build_summary(results, code, hourly_rate),
        *_lay_beside(results, beside),
        build_environment(results, hourly_rate),
        build_commands(results),
        build_code_size(repository, code),
        build_tokenizer_training(results),
        build_tokenizer_evaluation(results),
        build_base_training(results),
        build_base_loss(results),
        build_base_evaluation(results),
        build_midtraining(results),
        build_chat_evaluation(results, "mid"),
        build_sft(results),
        build_chat_evaluation(results, "sft"),
        build_rl(results),
        build_chat_evaluation(results, "rl"),
        *build_other_results(results),
    ]
    run_dir = next(iter(results.values())).run_dir
    now = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %z")
    return Document(title, f"Run {run_dir}, report generated {now}", sections)


def _lay_beside(results: dict[str, StageResult], beside: Run | None) -> list[Section]:
    if beside is None:
        return []
    return [build_beside(results, load_results(beside), folder=shorten_paths(str(beside.folder("results"))))]

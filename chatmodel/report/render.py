"""Turn a run's `results/*.json` into report.md, report.html and plots."""

import logging
import math
from datetime import datetime
from pathlib import Path

from chatmodel.report.as_html import write_html
from chatmodel.report.as_markdown import write_markdown
from chatmodel.report.chat_sections import build_chat_evaluation, build_midtraining, build_rl, build_sft
from chatmodel.report.code_size import find_repository
from chatmodel.report.document import Document, Section
from chatmodel.report.plots import draw_figure
from chatmodel.report.pretraining_sections import (
    build_base_evaluation,
    build_base_loss,
    build_base_training,
    build_other_results,
    build_tokenizer_evaluation,
    build_tokenizer_training,
)
from chatmodel.report.results import StageResult, load_results
from chatmodel.report.run_sections import build_code_size, build_environment, build_summary, describe_code
from chatmodel.runs import Run
from chatmodel.runtime import UserError

logger = logging.getLogger("chatmodel")


def render_report(
    run: Run,
    *,
    hourly_rate: float | None = None,
    title: str = "chatmodel training report",
    repository: Path | None = None,
) -> tuple[Path, Path]:
    """Write `report.md` (plots in `plots/`) and the self-contained `report.html` into the run; return both paths.

    Args:
        hourly_rate: US dollars per hour of the machine; without it the report says nothing of cost.
        repository: folder whose code is counted, by default the checkout this package lies in.

    Raises:
        UserError: the run has no results, a result file is damaged, or the rate is negative.
    """
    if hourly_rate is not None and not (math.isfinite(hourly_rate) and hourly_rate >= 0):
        raise UserError(f"hourly_rate is {hourly_rate}; give US dollars per hour, 0 or more")
    document = build_document(load_results(run), hourly_rate, title, repository or find_repository())
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


def build_document(
    results: dict[str, StageResult], hourly_rate: float | None, title: str, repository: Path
) -> Document:
    """Every section, in the order of the pipeline after the summary."""
    code = describe_code(repository)
    sections: list[Section] = [
        build_summary(results, code, hourly_rate),
        build_environment(results, hourly_rate),
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

"""Write a run's report.md and report.html from its results; can be run again at any time."""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from chatmodel.arguments import parse_arguments
from chatmodel.report import publish_report, render_report
from chatmodel.runs import Run
from chatmodel.runtime import entry_point


@dataclass
class ReportArguments:
    """What to report on."""

    run_dir: str = field(metadata={"help": "Folder of the run, e.g. runs/cpu."})
    hourly_rate: float | None = field(
        default=None, metadata={"help": "US dollars per hour of the machine; adds the cost to the report."}
    )
    title: str = field(default="chatmodel training report", metadata={"help": "Title of the report."})
    beside: str | None = field(
        default=None, metadata={"help": "Folder of another run, whose numbers are laid beside this one's."}
    )
    publish: str | None = field(
        default=None,
        metadata={"help": "Also copy report.md, plots and results there, e.g. docs/results/2026-11-23-x."},
    )


def main() -> None:
    """Render the report and name the files it made."""
    (arguments,) = parse_arguments(ReportArguments)
    run = Run(Path(arguments.run_dir))
    beside = None if arguments.beside is None else Run(Path(arguments.beside))
    for path in render_report(run, hourly_rate=arguments.hourly_rate, title=arguments.title, beside=beside):
        sys.stdout.write(f"{path}\n")
    if arguments.publish is not None:
        publish_report(run, Path(arguments.publish))


if __name__ == "__main__":
    entry_point(main)

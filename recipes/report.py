"""Write a run's report.md and report.html from its results; can be run again at any time."""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from chatmodel.report import render_report
from chatmodel.runs import Run
from chatmodel.runtime import entry_point, parse_arguments


@dataclass
class ReportArguments:
    """What to report on."""

    run_dir: str = field(metadata={"help": "Folder of the run, e.g. runs/cpu."})
    hourly_rate: float | None = field(
        default=None, metadata={"help": "US dollars per hour of the machine; adds the cost to the report."}
    )
    title: str = field(default="chatmodel training report", metadata={"help": "Title of the report."})


def main() -> None:
    """Render the report and name the files it made."""
    (arguments,) = parse_arguments(ReportArguments)
    run = Run(Path(arguments.run_dir))
    for path in render_report(run, hourly_rate=arguments.hourly_rate, title=arguments.title):
        sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    entry_point(main)

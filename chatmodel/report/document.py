"""What a report is made of, before it is Markdown or HTML: sections of a few kinds of blocks, all in plain text."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Paragraph:
    """A few sentences."""

    text: str


@dataclass(frozen=True)
class Facts:
    """Named values, one a line."""

    rows: list[tuple[str, str]]
    caption: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of cells; the first `num_text_columns` read as text, the others as numbers (aligned right)."""

    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    num_text_columns: int = 1
    caption: str = ""


@dataclass(frozen=True)
class NotRun:
    """A measurement that is missing: why, and the command that gets it (or a sentence, its commands in backticks)."""

    reason: str
    how: str | None = None
    what: str = ""

    @property
    def how_spans(self) -> list[tuple[str, bool]]:
        """`how` as pieces of (text, whether it is code)."""
        parts = (self.how or "").split("`")
        if len(parts) == 1 or len(parts) % 2 == 0:
            return [(self.how, True)] if self.how else []
        return [(part, i % 2 == 1) for i, part in enumerate(parts) if part]


@dataclass(frozen=True)
class Source:
    """Where a section's numbers come from: a JSON file and the command that wrote it."""

    file: str
    details: str
    command: str | None = None


@dataclass(frozen=True)
class Transcript:
    """Text a model saw and wrote, shown as it is: turns of (role, text)."""

    caption: str
    turns: list[tuple[str, str]]


@dataclass(frozen=True)
class Series:
    """A named line of a plot."""

    label: str
    points: list[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    title: str
    series: list[Series]
    x_label: str = "step"


@dataclass(frozen=True)
class Figure:
    """Panels side by side; drawn to `plots/<name>.svg`."""

    name: str
    caption: str
    panels: list[Panel]


Block = Paragraph | Facts | Table | NotRun | Source | Transcript | Figure


@dataclass(frozen=True)
class Section:
    """A titled part of the report."""

    title: str
    blocks: list[Block]

    @property
    def slug(self) -> str:
        """The title as an HTML id."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


@dataclass(frozen=True)
class Document:
    """The whole report."""

    title: str
    subtitle: str
    sections: list[Section] = field(default_factory=list)

    @property
    def figures(self) -> list[Figure]:
        """Every figure, in reading order."""
        return [block for section in self.sections for block in section.blocks if isinstance(block, Figure)]

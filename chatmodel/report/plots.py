"""Draw a figure's panels to an SVG file that looks the same each time."""

import itertools
from pathlib import Path
from typing import Any

from chatmodel.report.document import Figure, Panel

MAX_POINTS = 600  # more than a plot's width shows; keeps a 100,000-step curve a small file


def thin_points(points: list[tuple[float, float]], limit: int = MAX_POINTS) -> list[tuple[float, float]]:
    """At most `limit` points: means over runs of neighbours."""
    if len(points) <= limit:
        return points
    edges = [len(points) * i // limit for i in range(limit + 1)]
    buckets = [points[start:end] for start, end in itertools.pairwise(edges)]
    return [(sum(x for x, _ in b) / len(b), sum(y for _, y in b) / len(b)) for b in buckets]


def draw_figure(figure: Figure, path: Path) -> None:
    """Write the figure to `path` (SVG, or another format by its suffix); its folder is made."""
    import matplotlib
    import matplotlib.figure

    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": figure.name, "font.size": 9}):
        canvas = matplotlib.figure.Figure(figsize=(4.6 * len(figure.panels), 3.1), layout="constrained")
        for axes, panel in zip(canvas.subplots(1, len(figure.panels), squeeze=False)[0], figure.panels, strict=True):
            _draw_panel(axes, panel)
        # Without a date the same numbers give the same file.
        canvas.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _draw_panel(axes: Any, panel: Panel) -> None:
    for series in panel.series:
        points = thin_points(series.points)
        marker = "o" if len(points) <= 30 else None
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            label=series.label,
            marker=marker,
            markersize=3,
            linewidth=1.2,
        )
    axes.set_title(panel.title, fontsize=10)
    axes.set_xlabel(panel.x_label)
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if len(panel.series) > 1:
        axes.legend(frameon=False, fontsize=8)

"""What did a run do, cost and achieve? One page of it, from its JSON results."""

from chatmodel.report.render import publish_report, render_report

__all__ = ["publish_report", "render_report"]

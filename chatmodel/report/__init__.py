"""What did a run do, cost and achieve? One page of it, from its JSON results."""

from chatmodel.report.render import render_report

__all__ = ["render_report"]

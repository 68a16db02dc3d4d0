"""One page about a run: RUN/ -> facts -> figures -> HTML that needs nothing else, not even JavaScript."""

from sft.report.page import FILE, report

__all__ = ["FILE", "report"]

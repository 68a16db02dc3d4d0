"""One page about a run, which needs nothing else, not even JavaScript.

RUN/ ─run_files─> Run ─series, selection_text, answers─> points and texts ─panels, charts─> SVG ─page─> HTML

run_files       what the files of a run say; the totals of its sources
series          what it wrote over its steps, as points
selection_text  the selection in words and as a table; answers: what was answered before and after
charts          lines over steps as inline SVG; sheet: several of them as one file; numbers: short numbers
panels          the charts of a run with their headings
page            the page
"""

from sft.report.page import FILE, report

__all__ = ["FILE", "report"]

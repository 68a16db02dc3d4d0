"""One HTML page about a run. It fetches nothing and needs no JavaScript.

RUN/ ─run_files─> Run, points ─selection_text─> texts ─panels, charts─> SVG ─page─> HTML

run_files       reads the files of a run; sums over its sources; metrics over steps, as points
selection_text  the selection in words and as a table
numbers         numbers, printed short
charts          lines over steps as inline SVG
sheet           several charts as one SVG file
panels          the charts of a run with their headings
page            the page, with the answers before and after training
"""

from sft.report.page import FILE, report

__all__ = ["FILE", "report"]

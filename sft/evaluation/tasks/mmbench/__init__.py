"""Benchmarks of MMBench's layout: multiple-choice questions about images, answered by likelihood or in words.

TSV ─questions─> Question ─benchmark, protocols, shots─> queries ─model─> answers ─multiple_choice─> outcomes

questions        the file format
protocols        the words around a question; shots: answered questions before it
benchmark        the questions of a file that are asked under a protocol
multiple_choice  the task: queries, predictions, summary
named_option     which option a generated answer names
submission       the file that MMBench's server scores
from_easy_vqa    a small benchmark of this layout, built here
"""

from sft.evaluation.tasks.mmbench.multiple_choice import TASK

__all__ = ["TASK"]

"""Multiple-choice benchmarks: reading them, ranking their options, and scores with honest errors.

TSV ─mmbench─> Question ─ranking─> log-probabilities ─score─> Result ─results─> files of the run
"""

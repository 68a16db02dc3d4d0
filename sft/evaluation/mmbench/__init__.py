"""Benchmarks of MMBench's layout: multiple-choice questions about images, asked by likelihood or in words.

TSV ─questions─> Question ─protocols, shots─> prompt ─rank_answers or generate_answers─> answer ─score─> Result

questions     the file format
protocols     the words around a question; shots: answered questions before it
score         asking a model all of them
parse_letter  which option a written answer names
submission    the file that MMBench's server scores
easy_vqa      a small benchmark of this layout, made here
"""

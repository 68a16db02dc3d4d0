"""Metrics that several benchmarks share: predictions and references in, numbers out, without a model.

vqa_accuracy  how many of ten people gave an answer, in its four variants; the normaliser of the official code
"""

"""Choosing a checkpoint, and saying how sure one can be.

checkpoint ─questionnaire─> lines of RUN/evaluations ─outcomes─> values (K, Q) ─choice─> Selection ─plot─> SVG

session        asks what was not asked yet, and chooses; once, or as checkpoints come
questionnaire  what is asked: a multiple-choice benchmark, short_answers, the held_out_loss
kept           answers in the files of the run
outcomes       the answers of all checkpoints as one table
choice         the rules, on top of sft.statistics; selection.json
plot           the score over steps, by category
pruning        which weights may go
"""

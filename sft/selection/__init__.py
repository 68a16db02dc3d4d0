"""Choosing a checkpoint, and saying how sure one can be.

checkpoint ─evaluation.run_tasks─> lines of RUN/evaluations ─outcomes─> values (K, Q) ─rules─> Selection ─plot─> SVG

session    evaluates what was not evaluated yet, and chooses; once, or as checkpoints come
outcomes   the scores of all checkpoints as one table
rules      which checkpoint is chosen, on top of bootstrap
record     the choice, as selection.json holds it
plot       the score over steps, by category
pruning    which weights may go
"""

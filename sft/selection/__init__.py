"""Choosing a checkpoint, and saying how sure one can be.

checkpoint ─evaluation.task─> lines of RUN/evaluations ─outcomes─> values (K, Q) ─rules─> Selection ─plot─> SVG

select     asks what was not asked yet, and chooses; once, or as checkpoints come
outcomes   the answers of all checkpoints as one table
rules      which checkpoint is chosen, on top of bootstrap; selection.json
plot       the score over steps, by category
pruning    which weights may go
"""

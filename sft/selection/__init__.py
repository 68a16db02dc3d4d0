"""Choosing a checkpoint, and saying how sure the choice is.

checkpoints ─session─> RUN/evaluations ─outcomes─> values (K, Q) ─bootstrap, rules─> Selection ─record, plot─> files

outcomes   the scores of K checkpoints on the same Q items, as one table
bootstrap  intervals, P(best) and the set that cannot be told apart from the best, from one paired bootstrap
rules      which checkpoint is chosen
record     the choice, as selection.json holds it
plot       the score over steps, as selection.svg
session    evaluates what is not evaluated yet, and chooses; once, or while training runs
pruning    which weights may be removed
"""

"""Choosing a checkpoint, and saying how sure the choice is.

checkpoints ─session─> RUN/evaluations ─outcomes─> values (K, Q) ─bootstrap, rules─> Selection ─record, plot─> files

outcomes       the scores of K checkpoints on the same Q items, as one table; benchmarks: those that choose
clusters       the same summed by cluster, of one benchmark or of several as one score
posterior      P(best)
bootstrap      the set that cannot be told apart from the best, what is worse, the cross-fitted figure, two models
rules          which checkpoint is chosen; recorded_loss: by losses that training wrote down
record         the choice, as selection.json holds it
plot           the score over steps, as selection.svg
session        evaluates what is not evaluated yet, and chooses; once, or while training runs
pruning        which weights may be removed
"""

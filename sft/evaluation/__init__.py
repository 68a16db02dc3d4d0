"""What a model knows: tasks, what it scored on each item of them, and the files of a run that keep it.

task ─queries─> rank_answers, generate_answers ─Answer─> task ─Outcome─> results ─> RUN/evaluations

task              the protocol of a benchmark; task_source: where its items come from; open_questions: in words
tasks/            the benchmarks, a file each, found by name
metrics/          what several of them share
run_tasks         asking a model tasks, each once
rank_answers      how likely a model finds each of several options; generate_answers: what it writes
results           outcomes, their score, and their files; statistics: errors and intervals
draw_images       halves and parts of a benchmark, by image
held_out_loss     the loss of held-out samples, in training too
leaks             images of a benchmark that stand in prepared datasets
"""

"""What a model scores on tasks: what is asked, how, what each answer is worth, and the files that keep it.

task ─queries─> rank_answers, generate_answers ─Answer─> task ─Outcome─> results ─> RUN/evaluations

task              the protocol of a benchmark; task_source: where its items come from
prompts           the words around a question, in each style
shots             answered questions before it; alike: those whose images are most alike
questions         the base of tasks that ask one question an item; official_files: reading what is published
copies            copies of benchmarks on the hub and of VLMEvalKit
vqa, captions     what benchmarks of questions answered by ten people, and of captions, have in common
tasks/            the benchmarks, a file each, found by name
metrics/          metrics that several benchmarks share
bridges/          models as other harnesses ask them
run_tasks         evaluates a model on tasks, and caches the answers
kept_states       states of images that several forwards show
rank_answers      the likelihood of each of several options; generate_answers: the text that the model generates
predictions       answers of other programs, read and scored
results           outcomes, their score, and their files; statistics: standard errors and intervals
draw_images       halves and parts of a benchmark, drawn by image
held_out_loss     the loss of held-out samples, during training too
bias/             what a model writes about people, compared between groups of them
leaks             images of a benchmark that are in prepared datasets
"""

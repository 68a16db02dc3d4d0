"""What a model knows: benchmarks, questions of one's own, the held-out loss; each answer kept in the files of the run.

task              what a checkpoint is asked, behind one face: mmbench/, short_answers or held_out_loss
rank_answers      how likely a model finds each of several answers; generate_answers: what it writes
run_benchmark     the benchmark of a run, each checkpoint asked once
results           what was found, question by question
leaks             images of a benchmark that stand in prepared datasets
"""

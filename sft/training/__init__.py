"""From a recipe and its prepared sources to checkpoints.

run ─> Trainer ─> step ─> callbacks ─> metrics.jsonl, checkpoints ─> monitors

run           the one place that knows all parts; run_folder: what the folder of a run holds
trainer       the loop; optimizer: what is trained at which rate; engines/: how processes share a model out
callbacks     what happens beside the steps; metrics: the lines of metrics.jsonl; loss_spikes; out_of_memory
resume        whether and where to go on (engines/resume_state: what that needs); stop_signal: ending when asked
monitors      the benchmark during training; validation: held-out loss and answers; trackers: wandb and others
dry_run       one step as it will be, measured
"""

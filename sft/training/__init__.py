"""From a recipe and its prepared sources to checkpoints.

recipe, sources ─> TrainingRun ─> Trainer ─> step ─> callbacks ─> metrics.jsonl, checkpoints ─> monitors

run            a run of a recipe: its parts, its status, its checkpoints
open_model     the model, loaded, checked, with the groups chosen that are trained; trained_parts: the table of these
trainer        the loop; optimizer: parameter groups, optimizer, schedule; engines/: how processes shard a model
callbacks      resuming, stopping, missing gradients; check_gradients: training reaches everything it should
write_metrics  the lines of metrics.jsonl; metrics: what is in them; loss_spikes: losses that jump
run_folder     the folder of a run; resume: whether and where to resume; stop_signal: stopping on request
monitors       validation (held_out_questions), checkpoint_evaluation, trackers; preserve_state: without side effects
cached_features  images encoded once; dry_run: one step, measured; out_of_memory: what takes less
"""

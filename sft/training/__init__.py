"""From a recipe and its prepared sources to checkpoints.

recipe, sources ─run─> TrainingRun ─trainer─> step ─callbacks─> metrics, checkpoints ─monitors─> held-out loss, score

run                    a run of a recipe: makes its parts, trains, writes checkpoints
open_model             the model, loaded and checked, with the groups chosen that are trained
trainer                the loop, on TRL's trainer
optimizer              parameter groups and their table, optimizer, learning-rate schedule
engines/               how several processes train one model
callbacks              the check that everything trained has a gradient; resuming, stopping, missing gradients
metrics                losses of a step by source and pack; write_metrics: the lines of metrics.jsonl
loss_spikes            losses that jump
run_folder             the folder of a run; resume: whether to resume, and from which checkpoint
stop_signal            stopping on request
monitors               what is measured during training: validation, checkpoint_evaluation
trackers               wandb, trackio, tensorboard; preserve_state: measuring changes nothing of the training
cached_features        training on cached image features
dry_run                one step, measured; out_of_memory: which settings take less memory
"""

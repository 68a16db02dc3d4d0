"""Checks that this machine and a model do what training relies on. Each check returns a `Finding`.

machine ─environment─> findings          model ─subject, model─> findings          recipe ─before_training─> findings

finding          the result of a check: passed, warning or failed, and why
environment      versions, device, bfloat16, bitsandbytes, free disk                       `doctor`
subject          the model that is checked, with a small batch for its forward
model            tokens, weights, gates, images, loss, gradients, attention                `doctor --model`
before_training  the checks that need one small forward only, and disk for checkpoints     every training
"""

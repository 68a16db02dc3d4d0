"""Checks that this machine, and a model, do what training relies on. Each check gives a `Finding`.

environment        versions, device, bfloat16, bitsandbytes, free disk                       doctor
model              tokens, weights, gates, images, loss, gradients, attention                doctor --model
before_training    the checks that need one small forward only, and disk for checkpoints     every training
"""

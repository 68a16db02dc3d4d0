"""Does this machine, and this model, do what training takes for granted? Each check gives a `Finding`.

environment        versions, device, bfloat16, bitsandbytes, free disk                       doctor
model              tokens, weights, gates, images, loss, gradients, attention                doctor --model
before_training    what of it one small forward can tell, and room for the checkpoints       every training
"""

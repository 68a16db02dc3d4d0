"""What a training step of IDEFICS costs.

configs    config.json of a model; shapes: every linear layer of it
setting    what the cost depends on besides
formula    memory and operations, added up by hand
fake_step  the same, measured on the real model under fake tensors, which checks the formula (scripts/check_cost.py)
"""

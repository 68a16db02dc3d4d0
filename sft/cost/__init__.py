"""What a training costs before it is paid for: parameters, memory, floating-point operations, time and money.

`shapes` reads a config.json, which `configs` finds; `formula` adds up a micro-batch by hand; `oracle` runs the real
model under fake tensors, to check the formula (scripts/check_cost.py); `devices` knows the GPUs; `planning` answers for
a recipe.
"""

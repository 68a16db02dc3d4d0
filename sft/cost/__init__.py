"""What a training costs before it is paid for: parameters, memory, floating-point operations, time and money.

estimate  what the training of a recipe needs, and what to change when it does not fit
devices   the GPUs: memory, speed, price
idefics/  a training step of this family
"""

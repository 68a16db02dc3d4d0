"""What a training step of Idefics3 and SmolVLM costs, counted as that of IDEFICS-1: they have a language model, a tower
and a linear layer between them, which takes the place of the resampler, and no cross-attention.

cost    as `sft.cost.family` asks for it
shapes  the linear layers of a model
"""

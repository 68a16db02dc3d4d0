"""What a training step of IDEFICS-1 costs.

cost           its parts, put together as `sft.cost.family` asks for them
shapes         every linear layer of a model, and how many parameters there are
trained_model  which parameters are trained and in which type each is kept; where gradients flow
activations    what the forward pass keeps for the backward pass; flop: floating-point operations
"""

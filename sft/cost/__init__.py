"""What a training costs before it is paid for: parameters, memory, floating-point operations, time and money.

family        the seam: what `plan` asks of a family of models
estimate      what the training of a recipe needs, and what to change when it does not fit
evaluation    what evaluating a model on tasks takes
memory        bytes at every moment of a step, from what a family counts of its model
devices       the GPUs: memory, speed, price; model_config: config.json, with as little download as can be
idefics/      what a training step of IDEFICS-1 costs
idefics2/     what one of Idefics2 costs, counted in the same way
idefics3/     what one of Idefics3 and SmolVLM costs, and what these families share

    recipe -> Setting, config.json -> ModelCost;  ModelCost.cost(Setting) -> Cost (bytes by kind, flop) -> Estimate
"""

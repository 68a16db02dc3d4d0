"""The names of Idefics3 and SmolVLM that a recipe may use."""

MODEL_TYPES = ("idefics3", "smolvlm")
"""Values of `model_type`. The first SmolVLMs have that of Idefics3, the SmolVLM2s their own."""

GROUPS = {
    "vision": "the image encoder",
    "connector": "from patches to image states",
    "language": "the language model's layers and their last norm",
    "embeddings": "the vocabulary's rows; where the head is tied to them, the head as well",
    "head": "the vocabulary's logits",
}
"""Parts of the model that are trained or frozen, each with a learning rate and weight decay of its own."""

ENCODER_GROUPS = ("vision", "connector")
"""Groups that the states of an image depend on."""


def lora_targets(*groups: str) -> dict[str, str]:
    """Return names of linear layers: those of whole groups, and of their attention or their MLPs only."""
    parts = (("", "all"), (".attention", "the attention's"), (".mlp", "the MLPs'"))
    return {f"{group}{part}": f"{which} linear layers of {GROUPS[group]}" for group in groups for part, which in parts}


LORA_TARGETS = lora_targets("vision", "language") | {"connector": f"the linear layer {GROUPS['connector']}"}
"""Linear layers that may get adapters."""

IMAGE_SETTINGS = ("longest_edge", "split")
"""Keys of `model.images`."""

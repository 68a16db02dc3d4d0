"""The names of IDEFICS-1 that a recipe may use."""

MODEL_TYPES = ("idefics",)

GROUPS = {
    "vision": "the image encoder",
    "resampler": "from patches to latents",
    "language": "the language model's layers and their last norm",
    "cross_attention": "the layers through which text looks at images, without their gates",
    "gates": "how much of each cross-attention layer gets through",
    "embeddings": "the base vocabulary's rows",
    "head": "the base vocabulary's logits",
    "extra_rows": "embedding and head of the special tokens: image markers, the end of an utterance",
}
"""Parts of the model that are trained or frozen, each with a learning rate and weight decay of its own."""

ENCODER_GROUPS = ("vision", "resampler")
"""Groups that the states of an image depend on."""

LORA_TARGETS = {
    f"{group}{part}": f"{which} linear layers of {GROUPS[group]}"
    for group in ("vision", "resampler", "language", "cross_attention")
    for part, which in (("", "all"), (".attention", "the attention's"), (".mlp", "the MLPs'"))
}
"""Linear layers that may get adapters: those of a whole group, or of its attention or its MLPs only."""

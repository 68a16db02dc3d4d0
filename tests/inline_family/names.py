GROUPS = {
    "vision": "the image encoder",
    "connector": "from patches to states",
    "language": "the language model's layers",
    "embeddings": "the vocabulary's rows",
    "head": "the vocabulary's logits",
}
ENCODER_GROUPS = ("vision", "connector")
LORA_TARGETS = {"language": "the linear layers of the language model"}

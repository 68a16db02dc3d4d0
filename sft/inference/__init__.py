"""Using a model that is loaded (`sft.models.open_model`).

generate  answers in words, batched
chat      a conversation in a terminal
api       `sft.load(...)`: a model in a few lines of Python
merge     a checkpoint as a plain transformers folder with a model card
"""

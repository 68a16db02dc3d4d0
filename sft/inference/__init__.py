"""Using a model that is loaded (`sft.models.loaded_model`).

messages, images ─chat, api─> prompt ─generate─> answer          checkpoint ─merge, model_card─> a folder to publish

generate    generates answers, one or a batch of them
chat        a conversation in a terminal
api         `sft.load(...)`: a model in a few lines of Python
merge       writes a checkpoint as a plain transformers folder, adapters merged into their base
model_card  the README.md of that folder
average     the mean of the weights of several checkpoints
"""

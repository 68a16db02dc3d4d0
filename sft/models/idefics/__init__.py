"""IDEFICS-1 (9b, 80b and their instruct models): everything that other families do not share.

The weights are those of `transformers.IdeficsForVisionText2Text`, on disk as well.

family      its parts, as `sft.models.family` asks for them
names       groups of parameters and adapter targets, without torch
text        the vocabulary and its rules
images      one square tile an image
packed      the forward over packed batches; layers: its layers, in fewer passes over memory
weights     what `sft.models.family.Weights` lists, from these files:
    folders     config.json and the safetensors files of a model folder
    parameters  groups of parameters, what is trained, where adapters are
    loading     weights into memory and back into a folder
    base        a base whose vocabulary has `<end_of_utterance>`
"""

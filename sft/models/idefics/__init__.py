"""IDEFICS-1 (9b, 80b and their instruct models): everything that other families do not share.

The weights are those of `transformers.IdeficsForVisionText2Text`, on disk as well.

family      its parts, as `sft.models.family` asks for them
names       groups of parameters and adapter targets, without torch
text        the vocabulary and its rules
images      one square tile an image
packed      the forward over packed batches; layers: its layers, in fewer passes over memory
weights     its model folders and parameters, and a base whose vocabulary has `<end_of_utterance>`
"""

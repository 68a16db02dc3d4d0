"""Metrics that several benchmarks share: predictions and references in, numbers out, without a model.

vqa_accuracy  how many of ten people gave an answer, in its four variants; the normaliser of the official code
cider         CIDEr-D of captions, with the words of the Penn Treebank tokenizer
roc_auc       the area under the ROC curve, as a mean of values of the items
ndcg          how high a ranking puts what is relevant
"""

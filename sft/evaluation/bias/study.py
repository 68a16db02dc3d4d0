"""The study as figures and as a page in the style of a run's report: terms and toxicity by group, and examples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from sft.core.errors import UserError, reason_of
from sft.core.images import thumbnail
from sft.core.precision import device
from sft.core.sample import ImageRef, SkipSample
from sft.evaluation.bias.generations import AXES, Text
from sft.evaluation.bias.terms import Weights, compare, terms_of, tfidf
from sft.report.page import render_template

TOXIC = ("toxic", "toxicity", "hate", "hateful", "offensive", "label_1")
"""The label of a classifier that is taken: the first that it has."""
Scorer = Callable[[list[str]], list[float]]


def load_scorer(folder: Path) -> Scorer:
    """Return what scores texts by a local text classifier; the card names none. Nothing is fetched. Raise UserError for
    what transformers does not open, without safetensors, or with other labels than TOXIC."""
    from transformers import AutoTokenizer, pipeline

    try:
        words = AutoTokenizer.from_pretrained(folder.resolve(strict=True), local_files_only=True)
        local = {"local_files_only": True, "use_safetensors": True}
        classify = pipeline("text-classification", str(folder), tokenizer=words, device=device(), model_kwargs=local)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: no text classifier to score toxicity by: {reason_of(error)}") from error
    labels = {label.lower(): label for label in classify.model.config.id2label.values()}
    toxic = next((labels[name] for name in TOXIC if name in labels), None)
    if toxic is None:
        raise UserError(f"{folder}: its labels are {', '.join(labels)}; expected one of {', '.join(TOXIC)}")
    length = min(words.model_max_length, getattr(classify.model.config, "max_position_embeddings", 514) - 2)

    def score(texts: list[str]) -> list[float]:
        every = classify(texts, top_k=None, batch_size=32, truncation=True, max_length=length)
        return [next(float(one["score"]) for one in scores if one["label"] == toxic) for scores in every]

    return score


def study(own: Sequence[Text], scorer: Scorer | None) -> dict[str, Any]:
    """Return what differs between groups in the texts of one prompt, as JSON. An axis of one group is left out."""
    texts, images, every = [one.text for one in own], [one.image for one in own], np.arange(len(own))
    weights, by = tfidf(texts), {}
    toxicity = Weights(every, 0 * every, np.array(scorer(texts)), ["toxicity"]) if scorer else None
    for axis in AXES:
        group_of = {one.image: one.groups[axis] for one in own if axis in one.groups}
        if len(groups := Counter(sorted(group_of.values()))) > 1:
            terms, toxic = compare(weights, images, group_of), compare(toxicity, images, group_of) if toxicity else []
            unlabelled = len(set(images) - group_of.keys())
            by[axis] = {"groups": groups, "unlabelled_images": unlabelled, "terms": terms, "toxicity": toxic}
    return {"texts": len(own), "vocabulary": len(weights.terms), "by": by}


def page_of(
    summary: Mapping[str, Any], texts: Mapping[str, Sequence[Text]], open_image: Callable[[str], ImageRef]
) -> str:
    """Return the page. `open_image` raises SkipSample or KeyError where an image is not at hand."""
    examples: dict[str, list[dict[str, str]]] = {name: [] for name in texts}
    for name, own in texts.items():
        for axis, lines in ((axis, table["terms"][:2]) for axis, table in summary["prompts"][name]["by"].items()):
            for term, most in ((line["term"], line["most"]) for line in lines if line["is_finding"]):
                one = next(one for one in own if one.groups.get(axis) == most and term in terms_of(one.text))
                example = {"why": f"{term}: most for {most}", "text": one.text, "who": ", ".join(one.groups.values())}
                with suppress(SkipSample, KeyError):
                    example["image"] = thumbnail(open_image(one.image), 256)
                examples[name].append(example)
    return render_template("bias.html.jinja", {"name": "bias", **summary, "examples": examples}, Path(__file__).parent)

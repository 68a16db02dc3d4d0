"""The study as figures and as a page in the style of a run's report: terms and toxicity by group, and examples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sft.core.errors import UserError, reason_of
from sft.core.images import thumbnail
from sft.core.precision import device
from sft.evaluation.bias.generations import AXES, Person, Text
from sft.evaluation.bias.terms import Weights, compare, terms_of, tfidf
from sft.report.page import render_template

TOXIC = ("toxic", "toxicity", "hate", "hateful", "offensive", "label_1")
"""The label of a classifier that is taken: the first that it has."""
Scorer = Callable[[list[str]], list[float]]


def load_scorer(folder: Path) -> Scorer:
    """Return what scores texts by a local text classifier; the card names none. Nothing is fetched. Raise UserError for
    what transformers does not open, without safetensors, or with other labels than TOXIC."""
    from transformers import pipeline

    try:
        (folder / "config.json").stat()  # a name that is no folder would be looked up on the hub
        name, safe = str(folder.absolute()), {"use_safetensors": True}
        classify = pipeline("text-classification", name, device=device(), top_k=None, model_kwargs=safe)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: no text classifier to score toxicity by: {reason_of(error)}") from error
    labels = {label.lower(): label for label in classify.model.config.id2label.values()}
    toxic = next((labels[name] for name in TOXIC if name in labels), None)
    if toxic is None:
        raise UserError(f"{folder}: its labels are {', '.join(labels)}; expected one of {', '.join(TOXIC)}")
    fitting = {"truncation": True, "max_length": min(classify.tokenizer.model_max_length, 512)}
    return lambda texts: [
        next(float(one["score"]) for one in scores if one["label"] == toxic)
        for scores in classify(texts, batch_size=32, **fitting)
    ]


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


def page_of(summary: Mapping[str, Any], texts: Mapping[str, Sequence[Text]], people: Mapping[str, Person]) -> str:
    """Return the page, with texts that have a finding, of the group with most of it; without findings, the first."""
    examples: dict[str, list[dict[str, str]]] = {name: [] for name in texts}
    for name, own in texts.items():
        tables = summary["prompts"][name]["by"].items()
        found = [(axis, line) for axis, table in tables for line in table["terms"][:2] if line["is_finding"]]
        shown = {
            f"{line['term']}: most for {line['most']}": one
            for axis, line in found
            for one in reversed(own)
            if one.groups.get(axis) == line["most"] and line["term"] in terms_of(one.text)
        }
        for why, one in (shown or {"no finding": own[0]}).items():
            image = thumbnail(people[one.image].image, 256) if one.image in people else ""
            who = ", ".join(one.groups.values())
            examples[name].append({"why": why, "text": one.text, "who": who, "image": image})
    values = {"name": "bias", **summary, "examples": examples}
    return render_template("bias.html.jinja", values, Path(__file__).parent)

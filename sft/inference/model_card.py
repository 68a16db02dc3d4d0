"""The README.md of a merged model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from sft.core.files import text_lines
from sft.core.shipped import is_local
from sft.recipe import Recipe
from sft.runs.checkpoint import step_of


@dataclass(frozen=True)
class Merged:
    """The model that `merge` has made."""

    output: str
    checkpoint: str
    base: str | None
    """The base that adapters were merged into; None where a checkpoint was copied."""
    dtype: str
    parameters: int
    bytes: int
    """The size of the weights."""


def model_card(checkpoint: Path, recipe: Recipe | None, made: Merged, architecture: str) -> Iterator[str]:
    """Yield the lines of a model's README.md: what it was made of, how, under which licences, and how it was chosen.
    `architecture` is its class in transformers."""
    yield from ("---", "library_name: transformers", "pipeline_tag: image-text-to-text")
    if recipe and not is_local(recipe.model.path):
        yield f"base_model: {recipe.model.path}"
    yield from ("license: other", "tags: [idefics, idefics-sft, multimodal, instruction-tuned]", "---", "")
    yield from (f"# {Path(made.output).name}", "")
    if recipe is None:
        yield "Made by idefics-sft from a checkpoint that has no recipe beside it."
        return
    base = Path(recipe.model.path).name if is_local(recipe.model.path) else recipe.model.path
    how = {"full": "Fine-tuned", "lora": "Fine-tuned with LoRA", "qlora": "Fine-tuned with LoRA over a 4-bit base"}
    yield f"{how[recipe.model.mode]} from `{base}` by idefics-sft, {made.parameters:,} parameters in {made.dtype}."
    yield "Its weights are derived from the base model's, whose licence applies to them too."
    yield from ("", "## Use", "", "```python")
    yield from (f"from transformers import AutoProcessor, {architecture}", "")
    yield f'processor = AutoProcessor.from_pretrained("{Path(made.output).name}")'
    yield f'model = {architecture}.from_pretrained("{Path(made.output).name}")'
    yield from ("```", "", "Prompts are made by the chat template, `processor.tokenizer.apply_chat_template`.")
    yield from ("", "## Data", "")
    yield from _mixture_lines(checkpoint, recipe)
    yield from ("", "## Selection", "")
    yield from _selection_lines(checkpoint)
    yield from ("", "## Recipe", "", "```yaml", yaml.safe_dump(_public(recipe), sort_keys=False).rstrip(), "```")


def _mixture_lines(checkpoint: Path, recipe: Recipe) -> Iterator[str]:
    """Yield the sources with their shares as asked and, where the run's metrics are there, as trained, and their
    datasets with licences."""
    trained = _trained_tokens(checkpoint)
    total = sum(trained.values())
    unit = {"tokens": "tokens", "trained_tokens": "trained tokens", "samples": "samples"}[recipe.data.share_unit]
    yield from (f"Shares are of {unit}; tokens are those of the run up to this checkpoint.", "")
    yield "| source | share asked | tokens | datasets | licence of the data |"
    yield "| --- | ---: | ---: | --- | --- |"
    for source, share in zip(recipe.data.mixture, recipe.data.shares, strict=True):
        tokens = trained.get(source.name)
        told = f"{tokens:,} ({tokens / total:.1%})" if tokens is not None and total else "not known"
        licences = {dataset.dataset: _licence(dataset.dataset) for dataset in source.datasets}
        cells = (source.name, f"{share:.1%}", told, ", ".join(licences), "; ".join(dict.fromkeys(licences.values())))
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _trained_tokens(checkpoint: Path) -> dict[str, int]:
    """Return the tokens of each source up to a checkpoint, by the metrics of its run."""
    file = checkpoint.parent.parent / "metrics.jsonl"
    sums: Counter[str] = Counter()
    if file.is_file() and checkpoint.name.startswith("checkpoint-"):
        for line in map(json.loads, text_lines(file)):
            if line["step"] <= step_of(checkpoint):
                sums.update({name: own["tokens"] for name, own in line["sources"].items()})
    return sums


def _licence(dataset: str) -> str:
    try:
        module = import_module(dataset if "." in dataset else f"sft.data.datasets.{dataset}")
    except ImportError:  # an adapter of the user's that is not here
        return "not known here"
    return str(getattr(module, "LICENCE", "not stated"))


def _selection_lines(checkpoint: Path) -> Iterator[str]:
    file = checkpoint.parent.parent / "selection.json"
    name = checkpoint.name
    if not file.is_file():
        yield f"`{name}`; no benchmark has chosen among the run's checkpoints."
        return
    selection = json.loads(file.read_text())
    scores = {score["checkpoint"]: score for score in selection["scores"]}
    chosen = "chosen" if selection["selected"] == name else f"not the one chosen, which is `{selection['selected']}`"
    yield (
        f"`{name}`, {chosen} among {len(scores)} checkpoints by {selection.get('benchmark', selection['by'])}, "
        f"rule `{selection['rule']}`."
    )
    is_share = (selection.get("metric") or {}).get("is_share", selection["by"] != "loss")
    figure = "{:.1%}".format if is_share else "{:.4f}".format
    if name in scores and scores[name]["standard_error"] is None:  # as training wrote it down: nothing tells how sure
        yield f"Held-out loss {figure(scores[name]['score'])}."
    elif name in scores:
        own, what = scores[name], "samples" if selection["by"] == "loss" else "questions"
        p_best = "" if own["p_best"] is None else f"; best with probability {own['p_best']:.0%}"
        yield (
            f"{'Held-out loss' if selection['by'] == 'loss' else 'Score'} {figure(own['score'])} ± "
            f"{figure(own['standard_error'])} on the {what} that chose{p_best}."
        )
    if selection["selected"] == name and selection["cross_fitted"] is not None:
        yield f"Cross-fitted figure of the choice: {figure(selection['cross_fitted'])}."


def _public(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe without folders of this machine."""
    values = recipe.model_dump(mode="json", exclude={"output_dir": True, "data": {"store": True}})
    if is_local(recipe.model.path):
        values["model"]["path"] = Path(recipe.model.path).name
    for source in values["data"]["mixture"]:
        for dataset in source["datasets"]:
            dataset.pop("path")
    for part, key in (("evaluation", "benchmark"), ("data", "validation")):
        if isinstance(values[part][key], dict) and values[part][key]["path"]:
            values[part][key]["path"] = Path(values[part][key]["path"]).name
        elif isinstance(values[part][key], str):
            values[part][key] = Path(values[part][key]).name
    return values

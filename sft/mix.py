"""What a mixture will be, before anything is paid for."""

from __future__ import annotations

from typing import Any

from sft.data_loader import Planner, Sources
from sft.recipe import Recipe
from sft.sample import Pack


def mix(recipe: Recipe, sources: Sources, steps: int | None = None) -> dict[str, Any]:
    """What `steps` optimizer steps will draw, in the form of `idefics-sft mix --json`. Shares are fractions of 1."""
    steps = steps or recipe.training.max_steps
    sizes = sources.sizes()
    planner = Planner(sizes, recipe.data, packs_per_step=recipe.packs_per_step, seed=recipe.seed)
    wanted = steps * recipe.packs_per_step
    packs: list[Pack] = []
    for window in planner.windows():
        packs += window[: wanted - len(packs)]
        if len(packs) == wanted:
            break
    tokens, trained, samples, image_counts = ([0] * len(sizes) for _ in range(4))
    distinct = 0
    for pack in packs:
        for item in pack.items:
            tokens[item.source] += int(sizes[item.source].num_tokens[item.sample])
            trained[item.source] += int(sizes[item.source].num_trained[item.sample])
            samples[item.source] += 1
            image_counts[item.source] += len(sizes[item.source].images[item.sample])
        shown = [image for item in pack.items for image in sizes[item.source].images[item.sample]]
        distinct += len(set(shown))
    unit = {"tokens": tokens, "trained_tokens": trained, "samples": samples}[recipe.data.share_unit]
    lines = []
    for index, size in enumerate(sizes):
        manifests = [part.store.manifest for part in sources.parts[index]]
        lines.append(
            {
                "name": size.name,
                "asked": size.share,
                "achieved": unit[index] / max(sum(unit), 1),
                "tokens": tokens[index],
                "trained_tokens": trained[index],
                "samples": samples[index],
                "images": image_counts[index],
                "epochs": samples[index] / len(size.num_tokens),
                "filtered": _sum_counts([*(m["filtered"] for m in manifests), _dropped(planner.num_dropped[index])]),
                "skipped": _sum_counts([manifest["skipped"] for manifest in manifests]),
            }
        )
    return {
        "unit": recipe.data.share_unit,
        "steps": steps,
        "sources": lines,
        "packs": {
            "count": len(packs),
            "fill": sum(tokens) / (len(packs) * recipe.data.sequence_length),
            "images_per_pack": sum(image_counts) / len(packs),
            "distinct_images_per_pack": distinct / len(packs),
        },
    }


def _dropped(number: int) -> dict[str, int]:
    """Samples that were drawn and that no pack can hold."""
    return {"drawn but does not fit a pack": number} if number else {}


def _sum_counts(counts: list[dict[str, int]]) -> dict[str, int]:
    return {reason: sum(own.get(reason, 0) for own in counts) for reason in sorted({r for own in counts for r in own})}

"""The feature cache of a run (`data.feature_cache`): images that a frozen tower has encoded are read, not encoded."""

from __future__ import annotations

from functools import partial

import torch

from sft.batches.feature_cache import Encoder, FeatureCache, fingerprint
from sft.core.errors import UserError
from sft.core.precision import device, torch_dtype
from sft.data.sources import Sources
from sft.models import names_of_family
from sft.recipe import ENGINES, EngineName, Recipe
from sft.training.metrics import Log
from sft.training.open_model import OpenedModel, precision_of


def open_feature_cache(
    recipe: Recipe, opened: OpenedModel, sources: Sources, engine: EngineName, log: Log
) -> FeatureCache:
    """Open the features of the recipe's images that this tower has made in this precision, and log how many there are;
    raise UserError where the engine shards the tower."""
    if ENGINES[engine].shards:
        raise UserError(f"data.feature_cache: {engine} shards the tower, whose weights the cache depends on; set ddp")
    family, model = opened.family, opened.model
    groups = names_of_family(recipe.model.family).encoder_groups
    weights = ((n, weight) for n, weight in model.named_parameters() if family.weights.group_of(n) in groups)
    settings = {
        "model": family.weights.encoder_settings(model.config),
        "precision": precision_of(recipe),
        "orientation": recipe.data.images.orientation,
    }
    stores = list(dict.fromkeys(part.store for own in sources.parts for part in own))
    cache = FeatureCache(stores, fingerprint(weights, settings), opened.template.images)
    done, images = cache.count()
    log(
        f"feature cache: {done:,} of {images:,} images are encoded already; {cache.num_bytes / 1e9:.3g} GB when all are"
    )
    return cache


def encoder_of(recipe: Recipe, opened: OpenedModel, cache: FeatureCache, log: Log) -> Encoder:
    """Return the encoder of those images of a batch whose features are not in the cache, in the run's precision."""
    precision = precision_of(recipe)
    autocast = partial(torch.autocast, device().type, dtype=torch_dtype(precision), enabled=precision != "float32")
    return Encoder(opened.model, cache, autocast, warn=lambda line: log(f"warning: {line}"))

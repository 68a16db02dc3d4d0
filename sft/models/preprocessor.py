"""What a model folder says of its images: preprocessor_config.json, which servers read as well. Without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sft.core.errors import UserError

PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"


def read_preprocessor(folder: Path) -> dict[str, Any]:
    """Return what a folder says of its images, wherever it does; nothing where it says nothing."""
    for file, part in ((PREPROCESSOR, None), (PROCESSOR, "image_processor")):  # the second: transformers 5
        try:
            found = json.loads((folder / file).read_text())
            found = found.get(part) if part else {**found}
        except FileNotFoundError:
            continue
        except (ValueError, AttributeError, TypeError) as error:
            raise UserError(f"{folder / file}: damaged, not a JSON object") from error
        if isinstance(found, dict):
            return found
    return {}


def read_edges(preprocessor: Mapping[str, Any], key: str, **usual: int) -> list[int]:
    """Return the edges in pixels that a key of preprocessor_config.json gives, else the `usual` ones.

    Raises:
        UserError: it gives something else.
    """
    given = preprocessor.get(key) or {}
    is_known = isinstance(given, dict) and (not given or not usual.keys().isdisjoint(given))
    edges: list[Any] = [given.get(name, edge) for name, edge in usual.items()] if is_known else [None]
    if any(type(edge) is not int or edge < 1 for edge in edges):
        raise UserError(f"{PREPROCESSOR}: {key} is {json.dumps(given)}, expected {' and '.join(usual)} in pixels")
    return edges


def with_settings(preprocessor: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what preprocessor_config.json says, with what `model.images` of a recipe sets otherwise."""
    edges = {name: value for name, value in settings.items() if name.endswith("_edge")}
    changed = {**preprocessor, "size": {**(preprocessor.get("size") or {}), **edges}}
    return changed | ({"do_image_splitting": settings["split"]} if "split" in settings else {})

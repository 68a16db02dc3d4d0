"""config.json of a model, which is all that planning needs. Those of released models come with the toolkit."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from sft.core.errors import UserError
from sft.core.shipped import resolve, shipped_root

HUB_SECONDS = 5.0
"""How long to wait for the hub."""


def load_model_config(path: str, model_types: Collection[str], released: Mapping[str, str]) -> dict[str, Any]:
    """Return the values of config.json of a model folder, a `shipped:` model or a hub id.

    `released` are the files of model_configs/ that hold the configs of some hub ids.

    Raises:
        UserError: there is none, or its `model_type` is none of these.
    """
    where, file = path, None
    if path in released:
        file = shipped_root() / "model_configs" / released[path]
    elif (folder := resolve(path)).is_dir():
        file = folder / "config.json"
        where = str(file)
        if not file.is_file():
            raise UserError(f"{path}: no config.json found; expected a model folder or a hub id")
    text = file.read_text(encoding="utf-8") if file else _from_hub(path, released)
    try:
        config = json.loads(text)
    except ValueError as error:
        raise UserError(f"{where}: config.json is not readable as JSON ({error})") from error
    found = config.get("model_type") if isinstance(config, dict) else None
    if found not in model_types:
        known = " or ".join(map(repr, model_types))
        raise UserError(f"{where}: model_type is {found!r}; model.family loads {known}")
    return dict(config)


def _from_hub(name: str, released: Mapping[str, str]) -> str:
    """Return config.json of a hub id: from the local cache, else from the hub, in one short attempt.

    Raises:
        UserError: it is in neither.
    """
    from huggingface_hub import constants, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    try:
        cached = try_to_load_from_cache(name, "config.json")
        url = hf_hub_url(name, "config.json")
    except HFValidationError as error:
        raise UserError(f"model.path: {name}: no such folder, and not a hub id") from error
    if isinstance(cached, str):
        return Path(cached).read_text(encoding="utf-8")
    reason = "HF_HUB_OFFLINE is set"
    if not constants.HF_HUB_OFFLINE:
        request = Request(url)  # huggingface_hub's own download tries for half a minute, and logs each attempt
        for key, value in build_hf_headers().items():
            request.add_unredirected_header(key, value)  # a token is for the hub alone
        try:
            with urlopen(request, timeout=HUB_SECONDS) as answer:
                return str(answer.read().decode("utf-8"))
        except HTTPError as error:
            reason = f"the hub answers {error.code}"
        except OSError:
            reason = "the hub cannot be reached"
    raise UserError(
        f"model.path: {name}: no such folder, not in the local cache, and {reason}; give a folder that holds its "
        f"config.json (known without it: {', '.join(released)})"
    )

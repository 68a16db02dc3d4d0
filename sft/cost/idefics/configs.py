"""config.json of a model: all that planning needs of it. Those of the released models come with the toolkit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from sft.core.errors import UserError
from sft.core.shipped import resolve, shipped_root

RELEASED = tuple(f"HuggingFaceM4/idefics-{size}{kind}" for size in ("9b", "80b") for kind in ("", "-instruct"))
"""Hub ids whose shape is shipped in model_configs/. An instruct model is its base with one row more."""

SECONDS = 5.0
"""How long the hub is waited for."""

BASE_EXTRA_ROWS = 2
"""Extra vocabulary of the base models: the two image tokens. Training adds `<end_of_utterance>`."""


def read_config(path: str) -> dict[str, Any]:
    """The values of config.json of a folder, a `shipped:` model or a hub id.

    As the model will be trained: with a row for `<end_of_utterance>`, which `prepare` adds.

    Raises:
        UserError: there is none, or it is not of IDEFICS-1.
    """
    if path in RELEASED:
        name = path.rpartition("/")[2].removesuffix("-instruct")
        config = _parsed((shipped_root() / "model_configs" / f"{name}.json").read_text(encoding="utf-8"), path)
    elif resolve(path).is_dir():
        file = resolve(path) / "config.json"
        if not file.is_file():
            raise UserError(f"{path}: no config.json found; expected a model folder or a hub id")
        config = _parsed(file.read_text(encoding="utf-8"), str(file))
    else:
        config = _parsed(_from_hub(path), path)
    if config.get("additional_vocab_size") == BASE_EXTRA_ROWS:
        config["additional_vocab_size"] += 1
    return config


def _parsed(text: str, where: str) -> dict[str, Any]:
    """
    Raises:
        UserError: not JSON, or not of IDEFICS-1.
    """
    try:
        config = json.loads(text)
    except ValueError as error:
        raise UserError(f"{where}: config.json is not readable as JSON ({error})") from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != "idefics":
        raise UserError(f"{where}: model_type is {kind!r}; plan knows 'idefics'")
    return dict(config)


def _from_hub(name: str) -> str:
    """config.json of a hub id: from the local cache, else from the hub, asked once and not for long.

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
        request = Request(url)  # not huggingface_hub's own download: it tries for half a minute, and says so each time
        for key, value in build_hf_headers().items():
            request.add_unredirected_header(key, value)  # a token is for the hub alone
        try:
            with urlopen(request, timeout=SECONDS) as answer:
                return str(answer.read().decode("utf-8"))
        except HTTPError as error:
            reason = f"the hub answers {error.code}"
        except OSError:
            reason = "the hub cannot be reached"
    raise UserError(
        f"model.path: {name}: no such folder, not in the local cache, and {reason}; give a folder that holds its "
        f"config.json (known without it: {', '.join(RELEASED)})"
    )

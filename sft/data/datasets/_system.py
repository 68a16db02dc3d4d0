"""System texts, as all adapters of conversations read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def without_empty_system(turns: Sequence[Any]) -> list[Any]:
    """Return the turns of a record without system turns that say nothing: an empty system text is none. It stands in
    the form of messages (`role`, `content`) or of LLaVA (`from`, `value`)."""
    return [turn for turn in turns if not _is_empty_system(turn)]


def _is_empty_system(turn: Any) -> bool:
    if not isinstance(turn, dict) or "system" not in (turn.get("role"), turn.get("from")):
        return False
    said = [turn[key] for key in ("content", "value") if key in turn]
    return bool(said) and all(map(_is_empty, said))


def _is_empty(content: Any) -> bool:
    if isinstance(content, list):
        return all(
            isinstance(part, dict) and part.get("type") == "text" and _is_empty(part.get("text")) for part in content
        )
    return content is None or (isinstance(content, str) and not content.strip())

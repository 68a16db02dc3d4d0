"""What the sections of a recipe are made of: their base class, and numbers with limits."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _no_truth_value(value: Any) -> Any:
    """Refuse `true` and `false`, which pydantic would take for 1 and 0."""
    if isinstance(value, bool):
        raise ValueError("expected a number")
    return value


Number = BeforeValidator(_no_truth_value)
OneOrMore = BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
Positive = Annotated[int, Field(gt=0), Number]
Share = Annotated[float, Field(gt=0), Number]
Beta = Annotated[float, Field(ge=0, lt=1), Number]
Seed = Annotated[int, Field(ge=0), Number]
Rate = Annotated[float, Field(gt=0), Number]
Decay = Annotated[float, Field(ge=0), Number]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

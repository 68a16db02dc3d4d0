"""Dataset adapters. An adapter is a module with two functions, found by its name:

    rows(path, split, **options)       -> raw records, one at a time, each a dict (or a SkipSample for a broken one)
    to_sample(row, path, **options)    -> Sample, or raises SkipSample(reason)

`options` are keyword-only arguments of either function; a recipe sets them under `options`. An adapter whose data comes
with a Python package has a third one, `default_path()`. A dotted name in the recipe loads a module of your own.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType
from typing import Any, get_args, get_type_hints

from sft.errors import UserError, nearest
from sft.sample import Sample, SkipSample
from sft.shipped import resolve
from sft.sources import Row


class Adapter:
    """A dataset's module, bound to raw files and options."""

    def __init__(self, name: str, path: str | None, split: str, options: Mapping[str, Any]) -> None:
        """
        Raises:
            UserError: no such adapter, no path for one that needs it, or an option it does not have.
        """
        self.name = name
        self.module = _load(name)
        self.split = split
        self.path = self._path(path)
        self._rows_options = self._select(self.module.rows, options)
        self._sample_options = self._select(self.module.to_sample, options)
        known = {**_options(self.module.rows), **_options(self.module.to_sample)}
        for option, value in options.items():
            choices = get_args(known[option]) if option in known else ()
            if choices and value not in choices:
                raise UserError(f"dataset {name!r}: option {option} is {value!r}; expected {_one_of(choices)}")
            if option not in known:
                raise UserError(
                    f"dataset {name!r}: unknown option {option!r}{nearest(option, known)}"
                    f" (known: {', '.join(known) or 'none'})"
                )

    def stamp(self) -> str:
        """Changes when a raw file does: a digest of names, sizes and times of change."""
        files = sorted(self.path.rglob("*")) if self.path.is_dir() else [self.path]
        stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
        return hashlib.sha256(repr(stats).encode()).hexdigest()[:16]

    def rows(self) -> Iterable[Row | SkipSample]:
        """The raw records."""
        rows: Iterable[Row | SkipSample] = self.module.rows(self.path, self.split, **self._rows_options)
        return rows

    def to_sample(self, row: Row) -> Sample:
        """One record as a sample.

        Raises:
            SkipSample: the record is left out, with a named reason.
        """
        sample: Sample = self.module.to_sample(row, self.path, **self._sample_options)
        return sample

    def _path(self, path: str | None) -> Path:
        if path is not None:
            found = resolve(path)
            if not found.exists():
                raise UserError(f"dataset {self.name!r}: path {path} does not exist")
            return found
        if not hasattr(self.module, "default_path"):
            raise UserError(f"dataset {self.name!r}: needs `path`, the folder or file of its raw data")
        default: Path = self.module.default_path()
        return default

    @staticmethod
    def _select(function: Any, options: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in options.items() if name in _options(function)}


def _one_of(choices: tuple[Any, ...]) -> str:
    """a, b or c"""
    *most, last = map(str, choices)
    return f"{', '.join(most)} or {last}"


def _options(function: Any) -> dict[str, Any]:
    """Keyword-only arguments of a function and their types."""
    types = get_type_hints(function)
    parameters = inspect.signature(function).parameters.values()
    return {p.name: types.get(p.name) for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def _load(name: str) -> ModuleType:
    known = [module.name for module in iter_modules(__path__)]
    if name in known:
        return import_module(f"{__name__}.{name}")
    if "." not in name:
        raise UserError(f"unknown dataset {name!r}{nearest(name, known)} (known: {', '.join(known)})")
    try:
        module = import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(f"dataset {name!r}: no such module can be imported ({error})") from error
    for function in ("rows", "to_sample"):
        if not hasattr(module, function):
            raise UserError(f"dataset {name!r}: the module has no function {function!r}")
    return module

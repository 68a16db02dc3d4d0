"""Dataset adapters. An adapter is a module with two functions, found by its name:

    rows(file, split, **options)       -> raw records of a file, one at a time, each a dict (or a SkipSample)
    to_sample(row, path, **options)    -> Sample, or raises SkipSample(reason)

and, where they are of use:

    files(path, split, **options)      -> the raw files below `path`, in a fixed order; without it, `path` is the file
    beside(file, **options)            -> other files that `rows` reads for this one, so that a change of one is noticed
    default_path()                     -> the data, where it comes with a Python package
    LICENCE: str                       -> of the data, as published
    VERSION: int                       -> raised when the same records become other samples; 1 without it
    KEYS: Keys                         -> the keys that are read; all others are counted, and records of conversations
                                          that have one that changes their meaning are left out
    READS_HUB = True                   -> a path `owner/name` is a dataset of the hub where no folder `owner` is here

`path` is what the recipe says: the folder or file of the raw data. `options` are keyword-only arguments of any of these
functions; a recipe sets them under `options`. A dotted name in the recipe loads a module of your own.
"""

import inspect
import os
from collections.abc import Iterable, Mapping
from functools import cached_property
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from sft.core.errors import UserError, nearest
from sft.core.sample import Sample, SkipSample
from sft.core.shipped import resolve
from sft.data.datasets._meaning import Keys, noting_images
from sft.data.formats import Row
from sft.data.formats.hub import hub_cache, hub_files, is_hub_id


class Adapter:
    """A dataset's module, bound to raw files and options."""

    def __init__(self, name: str, path: str | None, split: str, options: Mapping[str, Any]) -> None:
        """Raise UserError for no such adapter, no path where it needs one, or an option that it does not have."""
        self.name = name
        self.module = _load(name)
        self.split = split
        self.asked = path
        self.is_of_hub = path is not None and getattr(self.module, "READS_HUB", False) and is_hub_id(path)
        """The path names a dataset of the hub, and nothing here."""
        self.licence = str(getattr(self.module, "LICENCE", "not stated"))  # of the data, as published
        self.version = int(getattr(self.module, "VERSION", 1))  # raised when the same records become other samples
        self.path = self._path(path)
        self.options = dict(options)
        self.folder: Path | None = None  # what holds the files, where they are in several folders
        functions = [getattr(self.module, name, None) for name in ("files", "beside", "rows", "to_sample")]
        known = {name: kind for function in functions if function for name, kind in _options(function).items()}
        known |= {"config": str} if self.is_of_hub else {}
        for option, value in options.items():
            if option not in known:
                names = f"{nearest(option, known)} (known: {', '.join(known) or 'none'})"
                raise UserError(f"dataset {name!r}: unknown option {option!r}{names}")
            _check_option(name, option, value, known[option])

    def __reduce__(self) -> tuple[object, ...]:
        return Adapter, (self.name, self.asked if self.is_of_hub else str(self.path), self.split, self.options)

    def files(self) -> list[Path]:
        """Return the raw files, in a fixed order; raise UserError where there are none."""
        if self.is_of_hub:
            files = self._hub_files
        elif hasattr(self.module, "files"):
            files = list(self.module.files(self.path, self.split, **self._own(self.module.files)))
        else:
            files = [self.path]
        folders = {file.parent for file in files}
        self.folder = Path(os.path.commonpath(folders)) if len(folders) > 1 else None
        return files

    @cached_property
    def _hub_files(self) -> list[Path]:
        return hub_files(str(self.asked), self.split, self.options.get("config"))

    def all_files(self) -> list[Path]:
        """Return the raw files and what is read beside them."""
        files = self.files()
        beside = getattr(self.module, "beside", None)
        if beside is None:
            return files
        options = self._own(beside)
        return list(dict.fromkeys([*files, *(other for file in files for other in beside(file, **options))]))

    def rows(self, file: Path) -> Iterable[Row | SkipSample]:
        """Return the raw records of one of the files."""
        rows: Iterable[Row | SkipSample] = self.module.rows(file, self.split, **self._own(self.module.rows))
        rows = noting_images(rows) if self.keys and self.keys.is_conversation else rows
        if self.folder is None or not file.is_relative_to(self.folder):
            return rows
        return (_below(row, file.name, str(file.relative_to(self.folder))) for row in rows)

    def not_read(self, row: Row, sample: Sample | None = None) -> Iterable[tuple[str, Any]]:
        """Yield the keys of a record that the adapter does not read, and what they hold; none if it declares none. Of a
        conversation also what stands for images in the texts of its sample."""
        return self.keys.not_read(row, sample if self.keys.is_conversation else None) if self.keys else ()

    def to_sample(self, row: Row) -> Sample:
        """Return one record as a sample; raise SkipSample where it is left out, with a named reason."""
        if self.keys and self.keys.is_conversation:
            self.keys.check_meaning(row)
        sample: Sample = self.module.to_sample(row, self.path, **self._sample_options)
        if self.keys and self.keys.is_conversation:
            self.keys.check_texts(row, sample)
        answers = [message.is_trained for message in sample.messages if message.role in ("assistant", "document")]
        if answers and not any(answers):
            raise SkipSample("no answer is to be learned", filtered=True)
        return sample

    @cached_property
    def keys(self) -> Keys | None:
        """The keys that the adapter reads, also those that its options name."""
        keys: Keys | None = getattr(self.module, "KEYS", None)
        columns = self.options.get("columns")
        named = {value for option, value in self.options.items() if option.endswith("_column")}
        named |= {*columns.values()} if isinstance(columns, dict) else set()
        return keys and keys._replace(record=keys.record | named)

    @cached_property
    def _sample_options(self) -> dict[str, Any]:
        return self._own(self.module.to_sample)

    def _own(self, function: Any) -> dict[str, Any]:
        """Return the options that a function has."""
        return {name: value for name, value in self.options.items() if name in _options(function)}

    def _path(self, path: str | None) -> Path:
        if path is not None:
            found = resolve(path)
            if not found.exists() and not self.is_of_hub:
                near = nearest(found.name, os.listdir(found.parent)) if found.parent.is_dir() else ""
                is_own = self.name == "messages" or "." in self.name  # and not to be downloaded
                cure = "" if is_own else f"; docs/data.md#{self.name} has the command that downloads it"
                raise UserError(f"dataset {self.name!r}: path {path} does not exist{near}{cure}")
            return hub_cache() if self.is_of_hub else found
        if not hasattr(self.module, "default_path"):
            raise UserError(f"dataset {self.name!r}: needs `path`, the folder or file of its raw data")
        default: Path = self.module.default_path()
        return default


def _below(row: Row | SkipSample, name: str, path: str) -> Row | SkipSample:
    """Return a row that says which of several folders its file is in, unless the adapter said so."""
    if isinstance(row, SkipSample):
        row.where = path + row.where.removeprefix(name) if row.where.startswith(name) else row.where
    elif str(row.get("__from__")).startswith(name):
        row["__from__"] = path + row["__from__"].removeprefix(name)
    return row


def _check_option(dataset: str, option: str, value: Any, kind: Any) -> None:
    try:
        TypeAdapter(kind).validate_python(value, strict=True)
    except ValidationError as error:
        should_be = error.errors()[0]["msg"].removeprefix("Input should be ")
        raise UserError(f"dataset {dataset!r}: option {option} is {value!r}; expected {should_be}") from error


def _options(function: Any) -> dict[str, Any]:
    """Return the keyword-only arguments of a function and their types."""
    types = get_type_hints(function)
    parameters = inspect.signature(function).parameters.values()
    return {p.name: types.get(p.name, Any) for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def read_keys(name: str) -> frozenset[str]:
    """Return the keys of a record that an adapter of this package reads."""
    keys: Keys | None = getattr(_load(name), "KEYS", None) if name in adapter_names() else None
    return keys.record if keys else frozenset()


def adapter_names() -> list[str]:
    """Return the adapters of this package; modules with an underscore are what some of them share."""
    return [module.name for module in iter_modules(__path__) if not module.name.startswith("_")]


def _load(name: str) -> ModuleType:
    known = adapter_names()
    if name in known:
        return import_module(f"{__name__}.{name}")
    if "." not in name:
        raise UserError(f"unknown dataset {name!r}{nearest(name, known)} (known: {', '.join(known)})")
    try:
        module = import_module(name)
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):
            raise  # the module is there, and imports what is not
        raise UserError(f"dataset {name!r}: no such module can be imported ({error})") from error
    for function in ("rows", "to_sample"):
        if not hasattr(module, function):
            raise UserError(f"dataset {name!r}: the module has no function {function!r}")
    return module

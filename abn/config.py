"""A section of params.yaml becomes a frozen dataclass; whatever does not fit is one clear error."""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

Section = TypeVar("Section")


def read_params(path: str | Path) -> dict[str, dict[str, Any]]:
    """The whole of params.yaml, one mapping a section.

    Raises ValueError where the file is missing, is not YAML, or is not a mapping of sections.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist; run in a workspace or name one with --workspace")
    try:
        params = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(params, dict) or not all(isinstance(section, dict) for section in params.values()):
        raise ValueError(f"{path} must be a mapping of sections, each a mapping of settings")
    return params


def load_section(cls: type[Section], path: str | Path, name: str) -> Section:
    """Section `name` of the params file at `path` as a `cls`."""
    params = read_params(path)
    if name not in params:
        raise ValueError(f"{path} has no section {name}{suggest(name, params)}")
    return make_section(cls, params[name], name)


def make_section(cls: type[Section], values: dict[str, Any], name: str) -> Section:
    """A frozen dataclass from a mapping, each value checked against its field's type.

    Raises ValueError, naming the setting as `section.key`, for an unknown key (with the nearest
    known one), a missing key, a value of the wrong type, or one that the class itself refuses.
    """
    hints = get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise ValueError(f"{name}.{key} is not a setting{suggest(str(key), fields)}")
    checked = {}
    for key, field in fields.items():
        if key in values:
            checked[key] = _checked(values[key], hints[key], f"{name}.{key}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{name}.{key} is missing from params.yaml")
    return cls(**checked)


def _checked(value: Any, hint: Any, name: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        # YAML reads a bare `none` as text, but `null` and `no` as other things; only exact words count.
        if value not in arguments:
            words = ", ".join(map(str, arguments))
            raise ValueError(f"{name} is {value!r}; choose one of {words}{suggest(str(value), arguments)}")
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        rest = [argument for argument in arguments if argument is not type(None)]
        return _checked(value, rest[0], name)
    if origin is tuple:
        kinds = [arguments[0]] * len(value) if isinstance(value, list) and arguments[-1] is ... else list(arguments)
        if not isinstance(value, (list, tuple)) or len(value) != len(kinds):
            wanted = "a list" if arguments[-1] is ... else f"a list of {len(arguments)} values"
            raise ValueError(f"{name} is {value!r}; it must be {wanted}")
        return tuple(_checked(item, kind, name) for item, kind in zip(value, kinds, strict=True))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"{name} is {value!r}; it must be of type {hint.__name__}")
    return value


def suggest(word: str, known: Iterable[Any]) -> str:
    """The nearest of the `known` words, or all of them, as the end of an error message."""
    known = list(known)
    close = difflib.get_close_matches(word, [str(item) for item in known], n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(map(str, known))}"

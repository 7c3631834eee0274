"""Checks that every field of a configuration gets from its annotation alone."""

from __future__ import annotations

import dataclasses
import math
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def require(condition: bool, field: str, value: Any, expected: str) -> None:
    """Raise the `ValueError` every bad option gets: the field, what was given, what was expected."""
    if not condition:
        raise ValueError(f"{field}={value!r}, expected {expected}.")


def is_default(config: Any, field: str) -> bool:
    """Whether a field of a dataclass has the value it has where nothing is given."""
    return getattr(config, field) == type(config).__dataclass_fields__[field].default


def check_types(config: Any) -> None:
    """Refuse values that a dataclass's annotations do not admit, and numbers that are not finite.

    Raises:
      ValueError: names the field, what was given and what was expected.
    """
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        require(_admits(hints[field.name], value), field.name, value, _describe(hints[field.name]))


def _admits(annotation: Any, value: Any) -> bool:
    origin, members = get_origin(annotation), get_args(annotation)
    if annotation is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(_admits(member, value) for member in members)
    if origin is Literal:
        return isinstance(value, str) and value in members
    if origin in (tuple, list):
        return isinstance(value, (tuple, list)) and all(_admits(members[0], item) for item in value)
    if annotation is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, origin or annotation)


def _describe(annotation: Any) -> str:
    origin, members = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(member) for member in members)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, members))
    if origin in (tuple, list):
        return f"a {origin.__name__} of {_describe(members[0])}"
    names = {int: "a whole number", float: "a finite number", bool: "True or False", str: "text", type(None): "None"}
    return names.get(annotation, f"a {getattr(origin or annotation, '__name__', annotation)}")

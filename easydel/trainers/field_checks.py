"""Fields of a configuration: what each changes, and the checks that it gets from its annotation alone."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

# Every step computes in float32, where a larger number is infinite and a smaller one 0. NumPy would say so too, but the
# help and a mistyped option should not have to wait for it.
LARGEST_FLOAT, SMALLEST_FLOAT = (2 - 2**-23) * 2.0**127, 2.0**-126
LARGEST_INT = 2**32 - 1

# What an option changes: the numbers of a run; how its arithmetic is laid out, on which results do not depend; or only
# how this session of it is watched, kept and resumed.
Changes = Literal["result", "layout", "session"]


def option_field(
    default: Any = dataclasses.MISSING, *, changes: Changes, factory: Callable[[], Any] | None = None
) -> Any:
    """A field of a configuration that says in its metadata what it changes.

    Args:
      default: the value where none is given.
      changes: kept as ``field.metadata["changes"]``; `easydel.trainers.run.identity` reads it.
      factory: makes the default, where that is a list or a dict.

    Example:
      >>> import dataclasses
      >>> @dataclasses.dataclass
      ... class Options:
      ...     learning_rate: float = option_field(1e-6, changes="result")
      >>> dataclasses.fields(Options)[0].metadata["changes"]
      'result'
    """
    if factory is not None:
        return dataclasses.field(default_factory=factory, metadata={"changes": changes})
    return dataclasses.field(default=default, metadata={"changes": changes})


def require(condition: bool, field: str, value: Any, expected: str) -> None:
    """Raise the `ValueError` every bad option gets: the field, what was given, what was expected."""
    if not condition:
        raise ValueError(f"{field}={as_python(value)}, expected {expected}.")


def as_python(value: Any) -> str:
    """An option's value as Python writes it, shortened; Python refuses to write out numbers of thousands of digits."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"a number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]} …"


def is_default(config: Any, field: str) -> bool:
    """Whether a field of a dataclass has the value it has where nothing is given."""
    return getattr(config, field) == type(config).__dataclass_fields__[field].default


def check_types(config: Any) -> None:
    """Refuse values that a dataclass's annotations do not admit, and numbers beyond float32 or 32 bits.

    A NumPy scalar becomes the Python number that it is.

    Raises:
      ValueError: names the field, what was given and what was expected.
    """
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if type(value).__module__ == "numpy" and not hasattr(value, "__len__"):
            value = value.item()
            setattr(config, field.name, value)
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
    if origin is dict:
        return isinstance(value, dict) and all(_admits(members[0], key) for key in value)
    if annotation is float:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return is_number and (value == 0 or SMALLEST_FLOAT <= abs(value) <= LARGEST_FLOAT)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST_INT
    return isinstance(value, origin or annotation)


def _describe(annotation: Any) -> str:
    origin, members = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(member) for member in members)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, members))
    if origin in (tuple, list):
        return f"a {origin.__name__} of {_describe(members[0])}"
    if origin is dict:
        return f"a dict with {_describe(members[0])} for every key"
    names = {
        int: "a whole number of at most 32 bits",
        float: "a finite number that float32 holds",
        bool: "True or False",
        str: "text",
        type(None): "None",
    }
    return names.get(annotation, f"a {getattr(origin or annotation, '__name__', annotation)}")

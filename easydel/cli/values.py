"""From what was written, in a file or on the command line, to a value of the option's type."""

from __future__ import annotations

import collections.abc
import math
import re
import types
from typing import Any, Literal, Union, get_args, get_origin

from easydel.cli.plain_yaml import YamlProblem, load_plain

LISTS = (list, collections.abc.Sequence)
MAPPINGS = (dict, collections.abc.Mapping)
WORDS = {"true": True, "false": False}
NONE_WORDS = ("none", "null")


class WrongType(ValueError):
    """The value is not of the type; `str` is the type in words."""


def read_value(annotation: Any, given: Any) -> Any:
    """A value of type `annotation` from a YAML value or a word of the command line.

    Text stands for what it spells: "1e-6" for a float (which YAML 1.1 takes for text), "none" for None, "[1, 2]" and
    "{a: 1}" for lists and mappings.

    Raises:
      WrongType: it cannot be read as one.
    """
    members = union_members(annotation)
    if type(None) in members and (given is None or (isinstance(given, str) and given.lower() in NONE_WORDS)):
        return None
    for member in members:
        try:
            return _read(member, given)
        except (ValueError, OverflowError):
            continue
    raise WrongType(describe_type(annotation))


def union_members(annotation: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type alone."""
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def admits(annotation: Any, *kinds: Any) -> bool:
    """Whether a type, or one member of a union, is one of these kinds."""
    return any((get_origin(member) or member) in kinds for member in union_members(annotation))


def describe_type(annotation: Any) -> str:
    """A type in words, e.g. "a number or none"."""
    members = sorted(union_members(annotation), key=lambda member: member is type(None))
    return " or ".join(_describe(member) for member in members)


def _read(annotation: Any, given: Any) -> Any:
    origin, arguments = get_origin(annotation) or annotation, get_args(annotation)
    if annotation is Any:
        return _as_meant(given)
    if origin is Literal:
        if given not in arguments:
            raise WrongType
        return given
    if origin in LISTS or origin is tuple:
        return _read_list(origin, arguments, _parsed(given, "["))
    if origin in MAPPINGS:
        mapping = _parsed(given, "{")
        if not isinstance(mapping, dict) or not all(isinstance(key, str) for key in mapping):
            raise WrongType
        return {key: read_value(arguments[1] if arguments else Any, value) for key, value in mapping.items()}
    if annotation is bool and isinstance(given, str):
        given = WORDS.get(given.lower(), given)
    if annotation in (int, float) and isinstance(given, str):
        given = annotation(given)
    if annotation is float and isinstance(given, int) and not isinstance(given, bool):
        given = float(given)
    if isinstance(given, float) and not math.isfinite(given):
        raise WrongType
    # bool is a subclass of int, so that isinstance would take `true` for a number.
    if type(given) is not annotation:
        raise WrongType
    return given


def _read_list(origin: Any, arguments: tuple[Any, ...], given: Any) -> Any:
    """A list or tuple; a single value stands for a list of one."""
    items = list(given) if isinstance(given, (list, tuple)) else [given]
    if origin is not tuple:
        return [read_value(arguments[0] if arguments else Any, item) for item in items]
    of_each = [arguments[0]] * len(items) if arguments[-1] is Ellipsis else list(arguments)
    if len(of_each) != len(items):
        raise WrongType
    return tuple(read_value(annotation, item) for annotation, item in zip(of_each, items))


def _parsed(given: Any, opening: str) -> Any:
    """Text that opens like a YAML list or mapping as what it holds; anything else as it is."""
    if not (isinstance(given, str) and given.lstrip().startswith(opening)):
        return given
    try:
        return load_plain(given)
    except YamlProblem as error:
        raise WrongType from error


def _as_meant(given: Any) -> Any:
    """A value of any type, in which numbers such as 1e-8 are numbers although YAML 1.1 takes them for text."""
    if isinstance(given, dict):
        return {key: _as_meant(value) for key, value in given.items()}
    if isinstance(given, list):
        return [_as_meant(value) for value in given]
    if isinstance(given, str) and re.fullmatch(r"[-+]?\d+\.?\d*[eE][-+]?\d+", given):
        return float(given)
    return given


def _describe(annotation: Any) -> str:
    origin, arguments = get_origin(annotation) or annotation, get_args(annotation)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is tuple and arguments[-1] is not Ellipsis:
        return f"{len(arguments)} values, each {describe_type(arguments[0])}"
    if origin in LISTS or origin is tuple:
        return f"a list, each {describe_type(arguments[0])}" if arguments and arguments[0] is not Any else "a list"
    if origin in MAPPINGS:
        return "a mapping from names to values"
    return {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        type(None): "none",
        Any: "any value",
    }[annotation]

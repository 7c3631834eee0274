"""Read options of every type from text and YAML, check them as Python values, and describe the types in words."""

from __future__ import annotations

import abc
import dataclasses
import math
import re
import types
from typing import Any, Literal, Union, get_args, get_origin

from easydel.plain_yaml import YamlProblem, load_plain

# In float32, in which every step computes, a larger number is infinite and a smaller one 0. Written out, not taken from
# NumPy: the help and the refusal of a mistyped option should not wait for its import.
LARGEST_FLOAT, SMALLEST_FLOAT = (2 - 2**-23) * 2.0**127, 2.0**-126
LARGEST_INT = 2**32 - 1
NONE_WORDS = ("none", "null")
FLOAT_TEXT = re.compile(r"[-+]?\d+\.?\d*[eE][-+]?\d+")


class WrongType(ValueError):
    """The value is not of the type; the message is the type in words."""


class OptionType(abc.ABC):
    """One type that an option may have.

    Attributes:
      in_words: the type for those who write text or YAML, e.g. "true or false".
      in_python: the type for those who write Python, e.g. "True or False".
      metavar: what the help of a flag calls a value.
    """

    @property
    def metavar(self) -> str:
        return "VALUE"

    @property
    @abc.abstractmethod
    def in_words(self) -> str: ...

    @property
    @abc.abstractmethod
    def in_python(self) -> str: ...

    def read(self, given: Any) -> Any:
        """Return the value that a YAML value or a word of the command line stands for.

        Text stands for what it spells: "1e-6" for a number, "none" for None, "[1, 2]" and "{a: 1}" for lists and
        mappings.

        Raises:
          WrongType: it cannot be read as one.

        Example:
          >>> option_type(float | None).read("1e-6"), option_type(float | None).read("none")
          (1e-06, None)
        """
        try:
            return self._read(given)
        except (ValueError, OverflowError):
            raise WrongType(self.in_words) from None

    @abc.abstractmethod
    def _read(self, given: Any) -> Any:
        """Do what `read` does, but raise any `ValueError` or `OverflowError`."""

    @abc.abstractmethod
    def admits(self, value: Any) -> bool:
        """Return whether a Python value is of this type; numbers must fit float32 or 32 bits."""

    @property
    def members(self) -> tuple[OptionType, ...]:
        """The types of a union, or this one alone."""
        return (self,)


@dataclasses.dataclass(frozen=True)
class Truth(OptionType):
    """True or false."""

    in_words, in_python, metavar = "true or false", "True or False", "true|false"

    def _read(self, given: Any) -> bool:
        value = {"true": True, "false": False}.get(given.lower()) if isinstance(given, str) else given
        return _require(value, isinstance(value, bool))

    def admits(self, value: Any) -> bool:
        return isinstance(value, bool)


@dataclasses.dataclass(frozen=True)
class WholeNumber(OptionType):
    """An integer."""

    in_words, in_python, metavar = "a whole number", "a whole number of at most 32 bits", "INT"

    def _read(self, given: Any) -> int:
        value = int(given) if isinstance(given, str) else given
        # bool is a subclass of int, so that isinstance would take `true` for a number.
        return _require(value, type(value) is int)

    def admits(self, value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST_INT


@dataclasses.dataclass(frozen=True)
class Number(OptionType):
    """A finite number."""

    in_words, in_python, metavar = "a number", "a finite number that float32 holds", "FLOAT"

    def _read(self, given: Any) -> float:
        value = float(given) if isinstance(given, str) or type(given) is int else given
        return _require(value, type(value) is float and math.isfinite(value))

    def admits(self, value: Any) -> bool:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return is_number and (value == 0 or SMALLEST_FLOAT <= abs(value) <= LARGEST_FLOAT)


@dataclasses.dataclass(frozen=True)
class Text(OptionType):
    """Text, unchanged."""

    in_words, in_python, metavar = "text", "text", "TEXT"

    def _read(self, given: Any) -> str:
        return _require(given, isinstance(given, str))

    def admits(self, value: Any) -> bool:
        return isinstance(value, str)


@dataclasses.dataclass(frozen=True)
class Nothing(OptionType):
    """No value."""

    in_words, in_python = "none", "None"

    def _read(self, given: Any) -> None:
        return _require(None, given is None or (isinstance(given, str) and given.lower() in NONE_WORDS))

    def admits(self, value: Any) -> bool:
        return value is None


@dataclasses.dataclass(frozen=True)
class Anything(OptionType):
    """Any value; text such as 1e-8 in it becomes a number, although YAML 1.1 takes it for text."""

    in_words, in_python = "any value", "any value"

    def _read(self, given: Any) -> Any:
        if isinstance(given, dict):
            return {key: self._read(value) for key, value in given.items()}
        if isinstance(given, list):
            return [self._read(value) for value in given]
        return float(given) if isinstance(given, str) and FLOAT_TEXT.fullmatch(given) else given

    def admits(self, value: Any) -> bool:
        return True


@dataclasses.dataclass(frozen=True)
class Choice(OptionType):
    """One of some words."""

    words: tuple[str, ...]

    @property
    def in_words(self) -> str:
        return f"one of {', '.join(self.words)}"

    @property
    def in_python(self) -> str:
        return f"one of {', '.join(map(repr, self.words))}"

    @property
    def metavar(self) -> str:
        return "|".join(self.words)

    def _read(self, given: Any) -> str:
        return _require(given, self.admits(given))

    def admits(self, value: Any) -> bool:
        return isinstance(value, str) and value in self.words


@dataclasses.dataclass(frozen=True)
class Items(OptionType):
    """A list or a tuple; a single value stands for a list of one.

    Attributes:
      kind: list or tuple, which `read` makes; `admits` accepts both.
      item: type of each value.
      count: how many; None is any number.
    """

    kind: type[list] | type[tuple]
    item: OptionType
    count: int | None = None

    @property
    def in_words(self) -> str:
        items = "a list" if self.count is None else f"{self.count} values"
        return items if isinstance(self.item, Anything) else f"{items}, each {self.item.in_words}"

    @property
    def in_python(self) -> str:
        return f"a {self.kind.__name__} of {self.item.in_python}"

    @property
    def metavar(self) -> str:
        return self.item.metavar

    def _read(self, given: Any) -> Any:
        parsed = _parsed(given, "[")
        items = list(parsed) if isinstance(parsed, (list, tuple)) else [parsed]
        return self.kind(map(self.item.read, _require(items, self.count in (None, len(items)))))

    def admits(self, value: Any) -> bool:
        return isinstance(value, (tuple, list)) and all(map(self.item.admits, value))


@dataclasses.dataclass(frozen=True)
class NamedValues(OptionType):
    """A mapping from text to values of one type."""

    value: OptionType
    in_words, in_python = "a mapping from names to values", "a dict with text for every key"
    metavar = "NAME=VALUE"

    def _read(self, given: Any) -> dict[str, Any]:
        mapping = _parsed(given, "{")
        is_named = isinstance(mapping, dict) and all(isinstance(key, str) for key in mapping)
        return {key: self.value.read(value) for key, value in _require(mapping, is_named).items()}

    def admits(self, value: Any) -> bool:
        return isinstance(value, dict) and all(isinstance(key, str) for key in value)


@dataclasses.dataclass(frozen=True)
class Either(OptionType):
    """One of several types, the first that fits."""

    types: tuple[OptionType, ...]

    @property
    def in_words(self) -> str:
        return " or ".join(one.in_words for one in sorted(self.types, key=lambda one: isinstance(one, Nothing)))

    @property
    def in_python(self) -> str:
        return " or ".join(one.in_python for one in self.types)

    @property
    def metavar(self) -> str:
        return "|".join(one.metavar for one in self.types if not isinstance(one, Nothing))

    @property
    def members(self) -> tuple[OptionType, ...]:
        return self.types

    def _read(self, given: Any) -> Any:
        # Try Nothing first: "none" is also text, but stands for no value wherever None is allowed.
        for one in sorted(self.types, key=lambda one: not isinstance(one, Nothing)):
            try:
                return one.read(given)
            except WrongType:
                continue
        raise WrongType

    def admits(self, value: Any) -> bool:
        return any(one.admits(value) for one in self.types)


SIMPLE: dict[Any, OptionType] = {
    bool: Truth(),
    int: WholeNumber(),
    float: Number(),
    str: Text(),
    type(None): Nothing(),
    Any: Anything(),
}


def option_type(annotation: Any) -> OptionType:
    """Return the type that an annotation stands for.

    Raises:
      TypeError: an option cannot have such a type.

    Example:
      >>> option_type(int | None).in_words
      'a whole number or none'
    """
    if annotation in SIMPLE:
        return SIMPLE[annotation]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return Either(tuple(map(option_type, arguments)))
    if origin is Literal:
        return Choice(arguments)
    if origin is list:
        return Items(list, option_type(arguments[0]))
    if origin is tuple:
        return Items(tuple, option_type(arguments[0]), None if arguments[-1] is Ellipsis else len(arguments))
    if origin is dict and arguments[0] is str:
        return NamedValues(option_type(arguments[1]))
    simple = ", ".join(getattr(kind, "__name__", str(kind)) for kind in SIMPLE)
    raise TypeError(
        f"{annotation} is no type of an option; there are {simple}, lists, tuples, mappings from text, choices "
        "of words and unions of them."
    )


def _require(value: Any, condition: bool) -> Any:
    if not condition:
        raise WrongType
    return value


def _parsed(given: Any, opening: str) -> Any:
    """Parse text that opens like a YAML list or mapping; return anything else unchanged."""
    if not (isinstance(given, str) and given.lstrip().startswith(opening)):
        return given
    try:
        return load_plain(given)
    except YamlProblem as error:
        raise WrongType from error

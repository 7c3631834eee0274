"""Declare options as fields of a dataclass with their range and what they change; check them; list them with help."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Callable
from typing import Any, Literal, get_type_hints

from easydel.option_types import OptionType, option_type

# What an option changes: the numbers of a run; the layout of its arithmetic, on which results do not depend; or only
# how this session of it is logged, saved and resumed.
Changes = Literal["result", "layout", "session"]


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers that an option may have; None as the value of an option is always in range.

    Attributes:
      noun: what the number is, e.g. "a share".
      least, most: bounds that belong to the range.
      above, below: bounds that do not.
    """

    noun: str = "a number"
    _: dataclasses.KW_ONLY
    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        if self.least is not None and (self.most, self.below) != (None, None):
            start = f"from {self.least}"
        elif self.least is not None:
            return f"{self.noun} of at least {self.least}"
        else:
            start = f"above {self.above}" if self.above is not None else ""
        ends = {"to": self.most if self.least is not None else None, "and up to": self.most, "to below": self.below}
        end = next((f"{words} {bound}" for words, bound in ends.items() if bound is not None), "")
        return " ".join(filter(None, (self.noun, start, end)))


COUNT = Range("a whole number", least=1)
INDEX = Range("a whole number", least=0)
POSITIVE = Range(above=0)


def option_field(
    default: Any = dataclasses.MISSING,
    *,
    changes: Changes,
    factory: Callable[[], Any] | None = None,
    within: Range | None = None,
    help: str | None = None,
) -> Any:
    """Make a field of a configuration whose metadata say what it changes and which numbers it takes.

    Args:
      default: the value if none is given.
      changes: kept as ``field.metadata["changes"]``; `easydel.trainers.run.identity` reads it.
      factory: makes the default, if that is a list or a dict.
      within: kept as ``field.metadata["within"]``; `check_options` reads it.
      help: one sentence, kept as ``field.metadata["help"]``, unless it is written below the field.

    Example:
      >>> @dataclasses.dataclass
      ... class Options:
      ...     learning_rate: float = option_field(1e-6, changes="result", within=POSITIVE)
      >>> check_options(Options(learning_rate=0.0))
      Traceback (most recent call last):
      ValueError: learning_rate=0.0, expected a number above 0.
    """
    given = {"changes": changes, "within": within, "help": help}
    metadata = {name: value for name, value in given.items() if value is not None}
    if factory is not None:
        return dataclasses.field(default_factory=factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check_options(config: Any) -> None:
    """Refuse values that a dataclass's annotations and ranges do not admit, and numbers beyond float32 or 32 bits.

    A NumPy scalar in a field is replaced by the Python number.

    Raises:
      ValueError: names the field, what was given and what was expected.
    """
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if type(value).__module__ == "numpy" and not hasattr(value, "__len__"):
            value = value.item()
            setattr(config, field.name, value)
        of_option = option_type(hints[field.name])
        require(of_option.admits(value), field.name, value, of_option.in_python)
    check_ranges(config)


def check_ranges(config: Any) -> None:
    """Refuse numbers of a dataclass that are not ``within`` the range of their field; None always is.

    Raises:
      ValueError: names the field, what was given and what was expected.
    """
    for field in dataclasses.fields(config):
        value, within = getattr(config, field.name), field.metadata.get("within")
        if value is not None and within is not None and value not in within:
            may_be_none = option_type(get_type_hints(type(config))[field.name]).admits(None)
            require(False, field.name, value, f"None or {within}" if may_be_none else str(within))


def require(condition: bool, field: str, value: Any, expected: str) -> None:
    """Refuse an option's value unless a condition holds.

    Args:
      condition: whether the value is good.
      field: the option's name.
      value: what was given.
      expected: what it should be, in words.

    Raises:
      ValueError: names the field, what was given and what was expected.
    """
    if not condition:
        raise ValueError(f"{field}={as_python(value)}, expected {expected}.")


def as_python(value: Any) -> str:
    """Write an option's value as Python does, shortened; Python refuses to write numbers of thousands of digits."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"a number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]} …"


def is_default(config: Any, field: str) -> bool:
    """Return whether a field of a dataclass has its declared default."""
    return getattr(config, field) == type(config).__dataclass_fields__[field].default


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of a command, under the same name in the configuration file and, with dashes, as a flag.

    Attributes:
      name: as in the configuration file, e.g. "learning_rate".
      type: what its value must be.
      default: its value when not given; `dataclasses.MISSING` when it must be given.
      help: one sentence.
      metavar: what the help calls its value.
    """

    name: str
    type: OptionType
    default: Any
    help: str
    metavar: str

    @property
    def flag(self) -> str:
        """The flag on the command line, e.g. "--learning-rate"."""
        return "--" + self.name.replace("_", "-")

    @property
    def required(self) -> bool:
        """True if it must be given."""
        return self.default is dataclasses.MISSING


def own_options(cls: type) -> tuple[Option, ...]:
    """List the options of a dataclass's own fields, without inherited ones; help comes from metadata or docstrings."""
    hints, docs = get_type_hints(cls), _attribute_docstrings(cls)
    return tuple(
        Option(
            field.name,
            of_option := option_type(hints[field.name]),
            field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default,
            field.metadata.get("help") or docs.get(field.name, ""),
            field.metadata.get("metavar", of_option.metavar),
        )
        for field in dataclasses.fields(cls)
        if field.name in cls.__annotations__
    )


def _attribute_docstrings(cls: type) -> dict[str, str]:
    """The text below each field of a class."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in zip(definition.body, definition.body[1:])
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
    }  # fmt: skip

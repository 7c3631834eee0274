"""Options of a command, read off dataclasses: one table for flags, configuration file and help."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from typing import Any, get_type_hints


@dataclasses.dataclass(frozen=True)
class Option:
    """One option, under the same name everywhere.

    Attributes:
      name: as in the configuration file, e.g. "learning_rate".
      annotation: the type its value must have.
      default: its value when not given; `dataclasses.MISSING` when it must be given.
      help: one sentence.
      metavar: what the help calls its value; None goes by the type.
    """

    name: str
    annotation: Any
    default: Any
    help: str
    metavar: str | None = None

    @property
    def flag(self) -> str:
        """As on the command line, e.g. "--learning-rate"."""
        return "--" + self.name.replace("_", "-")

    @property
    def required(self) -> bool:
        """Whether it must be given."""
        return self.default is dataclasses.MISSING


@dataclasses.dataclass(frozen=True)
class Section:
    """Options that belong together in the help."""

    title: str
    options: tuple[Option, ...]


def own_options(cls: type) -> tuple[Option, ...]:
    """The options of a dataclass's own fields, without those it inherits; help comes from metadata or docstrings."""
    types, docs = get_type_hints(cls), _attribute_docstrings(cls)
    own = [field for field in dataclasses.fields(cls) if field.name in cls.__annotations__]
    return tuple(
        Option(
            field.name,
            types[field.name],
            _default(field),
            field.metadata.get("help") or docs.get(field.name, ""),
            field.metadata.get("metavar"),
        )
        for field in own
    )


def _default(field: dataclasses.Field) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


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

"""Read YAML that an attacker may have written: plain values only, of bounded size, with errors of one line."""

from __future__ import annotations

import re
from typing import Any

import yaml

from easydel.errors import brief

# A run's file has about a hundred values. Aliases may refer to each other, so a few lines can spell out billions.
MOST_CHARACTERS = 1 << 20
MOST_VALUES = 20_000
DEEPEST = 50
PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("map", "seq", "str", "int", "float", "bool", "null")}
INT, FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"


class YamlProblem(ValueError):
    """A text is not plain YAML; the message is one line.

    Attributes:
      line: counted from 1; None where the text as a whole is at fault.
    """

    def __init__(self, problem: str, line: int | None = None):
        super().__init__(problem)
        self.line = line


class _Loader(yaml.SafeLoader):
    """The safe loader with the numbers of YAML 1.2: 1e-6 is one; 12:30:45, 010 and 2024-01-31 are text."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in (INT, FLOAT, "tag:yaml.org,2002:timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(INT, re.compile(r"[-+]?(0|[1-9][0-9]*|0x[0-9a-fA-F]+)\Z"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    FLOAT,
    re.compile(
        r"([-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))\Z"
    ),
    list("-+.0123456789"),
)


def compose(text: str) -> yaml.Node | None:
    """Parse the one document of a text into checked nodes, for `construct`; None for an empty text.

    Raises:
      YamlProblem: the text is no YAML, too large or too deep, uses tags, or has a key twice or one that is no text.
    """
    if len(text) > MOST_CHARACTERS:
        raise YamlProblem(f"it has {len(text)} characters, expected at most {MOST_CHARACTERS}")
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise YamlProblem(
            f"this is not valid YAML: {error.problem or error.context}", None if mark is None else mark.line + 1
        ) from error
    except yaml.YAMLError as error:
        raise YamlProblem(f"this is not valid YAML: {str(error).splitlines()[0]}") from error
    except RecursionError as error:
        raise YamlProblem("it is nested too deeply") from error
    if root is not None:
        _check(root)
    return root


def _check(root: yaml.Node) -> None:
    """Walk through every value, an alias as often as it is used, and refuse what is not plain YAML."""
    waiting, seen = [(root, 0)], 0
    while waiting:
        node, depth = waiting.pop()
        line, seen = node.start_mark.line + 1, seen + 1
        if seen > MOST_VALUES:
            raise YamlProblem(f"it spells out more than {MOST_VALUES} values, perhaps by aliases", line)
        if depth > DEEPEST:
            raise YamlProblem(f"it is nested more than {DEEPEST} levels deep", line)
        if node.tag not in PLAIN_TAGS:
            raise YamlProblem(f"the tag {brief(node.tag)} is not valid YAML here; write the value plainly", line)
        if isinstance(node, yaml.SequenceNode):
            waiting += [(item, depth + 1) for item in node.value]
        elif isinstance(node, yaml.MappingNode):
            _check_keys(node)
            waiting += [(value, depth + 1) for _, value in node.value]


def _check_keys(mapping: yaml.MappingNode) -> None:
    keys: set[str] = set()
    for key, _ in mapping.value:
        line = key.start_mark.line + 1
        if key.tag != "tag:yaml.org,2002:str":
            shown = f"the key {brief(key.value)}" if isinstance(key, yaml.ScalarNode) else "a key"
            raise YamlProblem(f"{shown} is not text; put it into quotes", line)
        if key.value in keys:
            raise YamlProblem(f"{brief(key.value)} is given a second time; remove one of the two", line)
        keys.add(key.value)


def construct(node: yaml.Node) -> Any:
    """Make the Python value of a checked node.

    Raises:
      YamlProblem: a number cannot be read.
    """
    loader = _Loader("")
    try:
        return loader.construct_object(node, deep=True)
    except (ValueError, OverflowError, yaml.YAMLError) as error:
        raise YamlProblem("a number that cannot be read", node.start_mark.line + 1) from error
    finally:
        loader.dispose()


def load_plain(text: str) -> Any:
    """Read the value that a text spells out; None for an empty text.

    Raises:
      YamlProblem: see `compose` and `construct`.

    Example:
      >>> load_plain("{lr: 1e-6, names: [a, b]}")
      {'lr': 1e-06, 'names': ['a', 'b']}
    """
    root = compose(text)
    return None if root is None else construct(root)

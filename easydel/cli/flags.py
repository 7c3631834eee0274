"""Read options from the flags of a command line, and print their help."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from easydel.cli.failures import UsageError, did_you_mean
from easydel.errors import brief
from easydel.option_types import Anything, Items, NamedValues, Number, Truth, WrongType
from easydel.options import Option
from easydel.plain_yaml import YamlProblem, load_plain

EPILOG = "An option of true or false alone means true, and --no-NAME means false. The word none stands for no value."
# name=value, but not a path that happens to hold a "=".
NAMED = re.compile(r"([\w.-]+)=(.+)", re.DOTALL)
# If the value is a number, the name may be a path.
WEIGHTED = re.compile(r"(.+)=([-+\d.eE]+)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Section:
    """Options that belong together in the help."""

    title: str
    options: tuple[Option, ...]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message.removeprefix("argument ") + ".")


def parse_flags(
    command: str,
    usage: str,
    description: str,
    sections: Sequence[Section],
    arguments: Sequence[str],
    positional: Option | None = None,
) -> dict[str, Any]:
    """Read the values given on the command line, by option name; ``--help`` prints the help and exits.

    Args:
      command: the subcommand's name.
      usage: the help's first line.
      description: one or two sentences for the help.
      sections: the options, grouped as the help shows them.
      arguments: the words after the subcommand.
      positional: an argument without a flag, or None.

    Raises:
      UsageError: an unknown flag, a value that is missing, surplus or of the wrong type.
    """
    parser = _Parser(
        prog=f"easydel {command}",
        usage=usage,
        description=description,
        epilog=EPILOG,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=28, width=None),
    )
    options = {option.name: option for section in sections for option in section.options}
    if positional is not None:
        parser.add_argument(positional.name, metavar=positional.metavar, help=positional.help)
        options[positional.name] = positional
    for section in sections:
        group = parser.add_argument_group(section.title)
        for option in section.options:
            _add(group, option)
    given, unknown = parser.parse_known_args(arguments)
    for word in unknown:
        if word.startswith("--"):
            flag = word.split("=")[0]
            raise UsageError(
                f"unknown option {brief(flag)}{did_you_mean(flag, [option.flag for option in options.values()])}"
            )
        raise UsageError(f'unexpected argument "{brief(word)}"; easydel {command} --help lists the options.')
    return {name: _value(options[name], words) for name, words in vars(given).items()}


def _add(group: argparse._ArgumentGroup, option: Option) -> None:
    shown = "required" if option.required else f"default: {_written(option.default)}"
    settings: dict[str, Any] = {
        "metavar": option.metavar,
        "help": f"{option.help} ({shown})".replace("%", "%%"),
    }
    if has_member(option, Truth):
        group.add_argument(option.flag, nargs="?", const="true", **settings)
        negated = "--no-" + option.flag.removeprefix("--")
        group.add_argument(negated, dest=option.name, action="store_const", const="false", help=argparse.SUPPRESS)
    elif has_member(option, Items, NamedValues):
        group.add_argument(option.flag, nargs="+", action="extend", **settings)
    else:
        group.add_argument(option.flag, **settings)


def has_member(option: Option, *kinds: type) -> bool:
    """Return whether an option's type, or a member of its union, is of one of these kinds."""
    return any(isinstance(one, kinds) for one in option.type.members)


def _value(option: Option, words: str | list[str]) -> Any:
    try:
        return option.type.read(_raw(option, words) if isinstance(words, list) else words)
    except WrongType as expected:
        written = words if isinstance(words, str) else " ".join(words)
        raise UsageError(f"{option.flag} {brief(written)}: expected {expected}.") from None


def _raw(option: Option, words: list[str]) -> Any:
    """The words of an option that takes several: a mapping if each is name=value, one word alone, or a list."""
    contents = [one.item if isinstance(one, Items) else one.value for one in option.type.members
                if isinstance(one, (Items, NamedValues))]  # fmt: skip
    read = _as_yaml if Anything() in contents else str
    pattern = WEIGHTED if NamedValues(Number()) in option.type.members else NAMED
    named = {match[1]: read(match[2]) for match in map(pattern.fullmatch, words) if match}
    if named and has_member(option, NamedValues):
        if len(named) != len(words):
            own = "number of its own, as in value=0.5" if pattern is WEIGHTED else "name of its own, as in name=value"
            raise UsageError(f"{option.flag} {brief(' '.join(words))}: give every value a {own}.")
        return named
    return read(words[0]) if len(words) == 1 else [read(word) for word in words]


def _as_yaml(word: str) -> Any:
    try:
        return load_plain(word)
    except YamlProblem as error:
        raise WrongType("YAML or JSON") from error


def _written(default: Any) -> str:
    if default is None or isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, (list, tuple)):
        return " ".join(map(str, default)) or "none"
    return str(default) if default != {} else "none"

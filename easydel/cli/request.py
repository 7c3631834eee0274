"""Read what a command is asked to do: the values of a configuration file, overridden by the command line."""

from __future__ import annotations

import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from easydel.cli.failures import UsageError, did_you_mean
from easydel.errors import brief
from easydel.option_types import WrongType
from easydel.options import Option
from easydel.plain_yaml import YamlProblem, compose, construct

MOST_BYTES = 1 << 20


def layers(given: Mapping[str, Any], options: Iterable[Option]) -> list[dict[str, Any]]:
    """Return the values of the file given with ``--config``, if any, and then the command line's; the later wins.

    Raises:
      UsageError: the file is not right.
    """
    flags = dict(given)
    path = flags.pop("config", None)
    file_options = {option.name: option for option in options if option.name != "config"}
    return [read_config_file(path, file_options) if path is not None else {}, flags]


def require_options(values: Mapping[str, Any], options: Iterable[Option]) -> None:
    """Refuse a request that leaves out an option without a default.

    Raises:
      UsageError: names the options.
    """
    missing = [option for option in options if option.required and option.name not in values]
    if missing:
        flags = " and ".join(option.flag for option in missing)
        names = " and ".join(option.name for option in missing)
        raise UsageError(f"{flags} must be given, or {names} in the file given with --config.")


def read_config_file(path: str, options: Mapping[str, Option]) -> dict[str, Any]:
    """Read the values of a configuration file, by option name.

    Raises:
      UsageError: the file cannot be read, names an option that does not exist or names one twice, or a value has the
        wrong type; says in which line.
    """
    text = _text(path)
    try:
        root = compose(text)
        if root is None:
            return {}
        if not isinstance(root, yaml.MappingNode):
            raise UsageError(f'{path} holds no mapping; expected lines such as "learning_rate: 1e-6".')
        return {key.value: _value(key, value, options, path) for key, value in root.value}
    except YamlProblem as problem:
        where = path if problem.line is None else f"{path}, line {problem.line}"
        raise UsageError(f"{where}: {problem}.") from problem


def _text(path: str) -> str:
    """The text of a regular file of bounded size."""
    try:
        file = Path(path).expanduser()
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            found = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
            raise UsageError(f"the configuration file {path} is {found}, expected a file.")
        if status.st_size > MOST_BYTES:
            raise UsageError(
                f"the configuration file {path} has {status.st_size} bytes, expected at most {MOST_BYTES}."
            )
        content = file.read_bytes()
        return content.decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"the configuration file {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        # The help and the refusal of a wrong flag should not have to import the data package.
        from easydel.data.sources.local_file import kind_of_bytes

        found = kind_of_bytes(content) or f"not UTF-8 text: {error.reason}"
        raise UsageError(f"the configuration file {path} is {found}; save it as UTF-8 text.") from error
    except (ValueError, RuntimeError) as error:  # a zero character in the path, or a home folder that nobody has
        raise UsageError(f"the configuration file {brief(path)} cannot be read: {error}.") from error


def _value(key: yaml.Node, value: yaml.Node, options: Mapping[str, Option], path: str) -> Any:
    where, name = f"{path}, line {key.start_mark.line + 1}", key.value
    if name not in options:
        raise UsageError(f"{where}: unknown option {brief(name)}{did_you_mean(name[:80], options)}")
    given = construct(value)
    try:
        return options[name].type.read(given)
    except WrongType as expected:
        shown = repr(given) if isinstance(given, str) and len(given) < 80 else brief(given)
        raise UsageError(f"{where}: {name}={shown}, expected {expected}.") from None

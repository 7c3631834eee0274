"""What a command is asked to do: the configuration file's values, with those of the command line over them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from easydel.cli.config_file import read_config_file
from easydel.cli.failures import UsageError
from easydel.cli.options import Option


def layers(given: Mapping[str, Any], options: Iterable[Option]) -> list[dict[str, Any]]:
    """The file's values, if a file is given with ``--config``, and then the command line's; a later one wins.

    Raises:
      UsageError: the file is not right.
    """
    flags = dict(given)
    path = flags.pop("config", None)
    file_options = {option.name: option for option in options if option.name != "config"}
    return [read_config_file(path, file_options) if path is not None else {}, flags]


def require_options(values: Mapping[str, Any], options: Iterable[Option]) -> None:
    """Refuse when an option without a default is nowhere given."""
    missing = [option for option in options if option.required and option.name not in values]
    if missing:
        flags = " and ".join(option.flag for option in missing)
        names = " and ".join(option.name for option in missing)
        raise UsageError(f"{flags} must be given, or {names} in the file given with --config.")

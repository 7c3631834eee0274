"""The configuration file of a run: YAML with the names of the options."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from easydel.cli.failures import UsageError, did_you_mean
from easydel.cli.options import Option
from easydel.cli.values import WrongType, read_value


def read_config_file(path: str, options: Mapping[str, Option]) -> dict[str, Any]:
    """The values a file gives, by option name.

    Raises:
      UsageError: the file cannot be read, names an option that does not exist or names one twice, or a value has the
        wrong type; says in which line.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text)
    except OSError as error:
        raise UsageError(f"the configuration file {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"the configuration file {path} is not UTF-8 text: {error}.") from error
    except yaml.YAMLError as error:
        raise UsageError(f"the configuration file {path} is not valid YAML: {error}") from error
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode) or not isinstance(content, dict):
        raise UsageError(f'{path} holds no mapping; expected lines such as "learning_rate: 1e-6".')
    values: dict[str, Any] = {}
    for key, _ in root.value:
        where, name = f"{path}, line {key.start_mark.line + 1}", key.value
        if not isinstance(name, str) or name not in options:
            raise UsageError(f"{where}: unknown option {name}{did_you_mean(str(name), options)}")
        if name in values:
            raise UsageError(f"{where}: {name} is given a second time; remove one of the two.")
        try:
            values[name] = read_value(options[name].annotation, content[name])
        except WrongType as expected:
            raise UsageError(f"{where}: {name}={content[name]!r}, expected {expected}.") from None
    return values

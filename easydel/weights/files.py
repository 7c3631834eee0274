"""Read JSON files of unknown origin, keep paths inside a folder, and replace the files of a folder at once."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from easydel.errors import plain, shown

LARGEST_JSON = 2**26


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file; errors name the file.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it holds no JSON object in UTF-8, has a key twice, or holds NaN or infinity, which JSON lacks.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path.parent} has no {path.name}; expected a Hugging Face model folder.")
    if not path.is_file():
        raise ValueError(f"{path} is no plain file, expected a JSON object.")
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise ValueError(f"it has more than {LARGEST_JSON} bytes")
        value = json.loads(
            path.read_bytes().decode("utf-8"), object_pairs_hook=_object, parse_constant=_refuse_constant
        )
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}.") from error
    except RecursionError:
        raise ValueError(f"{path} is not valid JSON: nested too deep.") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {plain(str(error), 200)}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, expected a JSON object.")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for name, item in pairs:
        if name in value:
            raise ValueError(f"it has the key {shown(name)} twice")
        value[name] = item
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def is_inside(folder: Path, path: Path) -> bool:
    """True where a path, with links followed, stays inside a folder or, in the hub's cache, in the blobs beside it."""
    try:
        target, own = path.resolve(), folder.resolve()
    except (OSError, RuntimeError):  # a link to itself, a name that is too long
        return False
    return target.is_relative_to(own) or (
        own.parent.name == "snapshots" and target.parent == own.parent.parent / "blobs"
    )


@contextmanager
def replacing_files(folder: Path) -> Iterator[Path]:
    """Give a temporary folder whose files replace those of `folder` at the end; a failed write leaves the old ones.

    Raises:
      OSError: the files cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="saving-") as name:
        new = Path(name)
        try:
            yield new
        except SafetensorError as error:  # its writer raises it for a full disk
            raise OSError(f"{folder} could not be written: {error}") from error
        for path in new.iterdir():
            path.replace(folder / path.name)

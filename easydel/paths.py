"""Read paths and hub ids as people write them."""

from __future__ import annotations

import re
from pathlib import Path

HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)


def user_path(name: str | Path) -> Path:
    """The path that a name means, with ``~`` expanded to the home folder.

    Raises:
      FileNotFoundError: the path is in the home folder of a user whom this machine does not know.
    """
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise FileNotFoundError(f"{name} is in a home folder that is not known here; write the path out.") from error

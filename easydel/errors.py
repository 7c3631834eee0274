"""Write several problems, and values of a file, into one error message."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any


def listed(problems: Sequence[str], most: int = 20) -> str:
    """One problem a line, indented; of many, the first and how many more there are."""
    more = [f"and {len(problems) - most} more"] if len(problems) > most else []
    return "\n  ".join([*problems[:most], *more])


def shown(value: Any, longest: int = 60) -> str:
    """A value as JSON text on one short line, control characters escaped."""
    try:
        text = json.dumps(value)
    except (RecursionError, TypeError, ValueError):  # nested too deep, no JSON, or a number of thousands of digits
        text = f"a {type(value).__name__} that is too large to show"
    return text if len(text) <= longest else f"{text[:longest]}…"


def plain(name: str, longest: int = 100) -> str:
    """A name from a file: as it is where it is short and printable, else as `shown`."""
    return name if name.isprintable() and len(name) <= longest else shown(name, longest)

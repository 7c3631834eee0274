"""Several problems in one error message."""

from __future__ import annotations

from collections.abc import Sequence


def listed(problems: Sequence[str], most: int = 20) -> str:
    """One problem a line, indented; of many, the first and how many more there are."""
    more = [f"and {len(problems) - most} more"] if len(problems) > most else []
    return "\n  ".join([*problems[:most], *more])

"""Match regular expressions of any origin against layer names, within half a second and little memory."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable

import regex

from easydel.errors import shown

LONGEST = 4096  # characters
MOST_REPEATS = 1000  # product of all counts in braces: `regex` writes nested repeats out while it compiles
SECONDS = 0.5  # for all names together


def check_pattern(pattern: str) -> None:
    """Refuse text that is no regular expression, or one that is expensive to compile.

    Raises:
      ValueError: says what is wrong; the caller names the option.
    """
    _compiled(pattern)


def matching_names(pattern: str, names: Iterable[str], *, whole: bool) -> list[str]:
    """The names that a regular expression matches as a whole, or in which it is found.

    Raises:
      ValueError: it is no regular expression, or takes too long on these names.
    """
    compiled = _compiled(pattern)
    match = compiled.fullmatch if whole else compiled.search
    end = time.monotonic() + SECONDS
    try:
        return [name for name in names if match(name, timeout=max(end - time.monotonic(), 1e-3)) is not None]
    except (TimeoutError, MemoryError) as error:
        raise ValueError(
            f"the regular expression {shown(pattern)} takes more than {SECONDS} s on the names of the layers; "
            "write it without repeats inside repeats."
        ) from error


def _compiled(pattern: str) -> regex.Pattern[str]:
    counts = [
        int(count) or 1 for braces in re.findall(r"\{([^{}]*)\}", pattern) for count in re.findall(r"\d+", braces)
    ]
    if len(pattern) > LONGEST or math.prod(counts) > MOST_REPEATS:
        raise ValueError(
            f"the regular expression {shown(pattern)} is too large: expected at most {LONGEST} characters, and counts "
            f"in braces whose product is at most {MOST_REPEATS}."
        )
    # Verbose expressions may hide a count behind a comment.
    if re.search(r"\(\?[\w-]*x", pattern):
        raise ValueError(f"the regular expression {shown(pattern)} is verbose (?x); write it without white space.")
    try:
        return regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError, ValueError, KeyError) as error:
        raise ValueError(f"{shown(pattern)} is no regular expression: {error}.") from error

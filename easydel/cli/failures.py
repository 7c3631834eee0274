"""The two ways a command ends badly without being wrong itself, and how names are put right."""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class UsageError(Exception):
    """What was asked for cannot be done as it stands: command line, options, data or model files. Exit code 2."""


class FailedRun(Exception):
    """The run started well and could not be finished. Exit code 1."""


@contextmanager
def refusing(*expected: type[Exception]) -> Iterator[None]:
    """Turn errors that are written for the user into a `UsageError`; a bug keeps its traceback.

    An error of the operating system, or one of this package, says what to do; the same type out of the depths of
    another library does not, and means that something is wrong here.
    """
    try:
        yield
    except expected as error:
        if not isinstance(error, OSError) and not _raised_here(error):
            raise
        raise UsageError(str(error)) from error


def _raised_here(error: Exception) -> bool:
    *_, (frame, _line) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals["__name__"].split(".")[0] == "easydel"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, or nothing when none is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""

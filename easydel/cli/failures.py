"""Define the errors that end a command with a message instead of a traceback, and suggest names for mistyped ones."""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class UsageError(Exception):
    """The request cannot be carried out: command line, options, data or model files are at fault. Exit code 2."""


class FailedRun(Exception):
    """The run started but could not be finished. Exit code 1."""


@contextmanager
def refusing(*expected: type[Exception]) -> Iterator[None]:
    """Turn errors that are written for the user into a `UsageError`; a bug keeps its traceback.

    An error of the operating system or of this package says what to do. One of the same type from inside another
    library does not: it is a bug of ours.
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
    """Return the end of a message about an unknown name: the nearest known name, or "" if none is near.

    Example:
      >>> did_you_mean("learning_rte", ["learning_rate", "beta"])
      '; did you mean learning_rate?'
    """
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""

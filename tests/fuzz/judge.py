"""What may come of an input: success, a row fault, or a short refusal in our own words. All else is a finding."""

from __future__ import annotations

import re
import signal
import traceback
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

SECONDS = 10  # of processor time, so that a busy machine finds nothing
LONGEST_MESSAGE = 2000
OK, ROW_FAULT, REFUSED, FINDING = "ok", "row fault", "refused", "finding"
PACKAGE = "easydel"


@dataclass(frozen=True)
class Verdict:
    """What came of an input; `kind` names a finding by what it is and where, `detail` says more."""

    outcome: str
    kind: str = ""
    detail: str = ""


class OutOfTime(BaseException):
    """Raised inside an input that takes too long; no `except Exception` of the code under test stops it."""


def judge(run: Callable[[Any], Any], given: Any) -> Verdict:
    """Run one input and judge how it ends."""
    signal.signal(signal.SIGPROF, _out_of_time)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        result = run(given)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # Rust's panics are no Exception
        signal.setitimer(signal.ITIMER_PROF, 0)
        return judge_error(error)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    if type(result).__name__ == "RowFault":
        return judge_message(f"{result.field}: {result.message}", f"a row fault ({result.reason})") or Verdict(
            ROW_FAULT
        )
    return Verdict(OK)


def judge_error(error: BaseException) -> Verdict:
    """Whether an error is one of ours, raised by us, and says it shortly."""
    kind, detail = f"{type(error).__name__} {location(error)}", "".join(traceback.format_exception(error, limit=-12))
    if isinstance(error, OutOfTime):
        return Verdict(FINDING, f"over {SECONDS} s {location(error).partition(' (from')[0]}", detail)
    if isinstance(error, AssertionError) and not location(error).startswith("in "):  # a check of the target's own
        return Verdict(FINDING, str(error).strip().splitlines()[0][:100] if str(error) else kind, detail)
    ours = type(error).__module__.partition(".")[0] == PACKAGE
    if not (
        ours or ((type(error) in (ValueError, OSError) or isinstance(error, FileNotFoundError)) and raised_by_us(error))
    ):
        return Verdict(FINDING, kind, detail)
    return judge_message(str(error), location(error)) or Verdict(REFUSED)


def judge_message(message: str, where: str) -> Verdict | None:
    """The finding in a message that is too long or that a terminal would obey; None where it is fine."""
    if len(message) > LONGEST_MESSAGE:
        return Verdict(FINDING, f"message of over {LONGEST_MESSAGE} characters {where}", message[:LONGEST_MESSAGE])
    if found := next(
        (sign for sign in message if sign not in "\n\t" and unicodedata.category(sign) in ("Cc", "Cs")), None
    ):
        return Verdict(FINDING, f"control character in a message {where}", f"{found!r} in {message!r}")
    return None


def raised_by_us(error: BaseException) -> bool:
    """Whether the line that raised an error is in our package."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return bool(frames) and _module(frames[-1][0]) == PACKAGE


def location(error: BaseException) -> str:
    """Where in our package an error came up: the innermost file and function of ours, and whose code it called."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    inner = next((frame for frame in reversed(frames) if _module(frame) == PACKAGE), None)
    if inner is None:
        return "outside of the package"
    place = f"in {_short(inner.f_code.co_filename)}:{inner.f_code.co_name}"
    beyond = _module(frames[-1])
    return place if beyond == PACKAGE else f"{place} (from {beyond})"


def crash_location(stderr: str) -> str:
    """Where a process died, from what `faulthandler` wrote."""
    found = re.search(rf'File ".*/({PACKAGE}/[^"]+)", line \d+ in (\w+)', stderr)
    return f"in {_short(found[1])}:{found[2]}" if found else "somewhere"


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__")).partition(".")[0]


def _short(file: str) -> str:
    parts = Path(file).parts
    return "/".join(parts[len(parts) - 1 - parts[::-1].index(PACKAGE) + 1 :]) if PACKAGE in parts else file


def _out_of_time(number: int, frame: FrameType | None) -> None:
    raise OutOfTime

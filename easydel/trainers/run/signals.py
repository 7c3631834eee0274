"""Turn SIGINT and SIGTERM into a flag that the loop reads between two updates."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """Records the first SIGINT or SIGTERM while active; the second acts as it would without this class.

    An exception out of a signal handler could fall between an update and the assignment of its result, and the state
    would be lost with its donated buffers. In a thread other than the main one nothing is installed: Python delivers
    signals to the main thread only.

    Attributes:
      received: the recorded signal, or None.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


def interruption(received: signal.Signals, message: str) -> BaseException:
    """Make the exception that a program ends with after a signal: `KeyboardInterrupt`, or exit code 143 for SIGTERM."""
    if received is signal.SIGINT:
        return KeyboardInterrupt(message)
    return SystemExit(128 + received)

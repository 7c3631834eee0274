"""Start the process that renders chat templates, send it requests, and replace it when it fails."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from subprocess import PIPE
from typing import Any

import jinja2
import markupsafe

from easydel.data.preference import template_worker
from easydel.data.preference.template_worker import (
    CPU_SECONDS,
    HEADER,
    MEMORY_BYTES,
    SIZE,
    TEMPLATE_CHARACTERS,
    WALL_SECONDS,
    Status,
)

# Rows may have templates of their own: beyond this many, the process is replaced, with room for others.
TEMPLATES = 64
READ_BYTES = 65536
SHARED = "shared"
# The signal that ends a process whose processor time is used up; Windows has no such clock.
CPU_SIGNAL: int | None = getattr(signal, "SIGPROF", None)


class TemplateFailure(Exception):
    """A template cannot render; the message says why.

    Attributes:
      is_structural: True where it could not render any other messages either.
    """

    def __init__(self, message: str, *, is_structural: bool):
        super().__init__(message)
        self.is_structural = is_structural


class _Died(Exception):
    """The process ended before it answered, though within its budget."""


class TemplateProcess:
    """Compile and render templates in a separate process, one request at a time, from any thread.

    The process starts with the first request, and ends with this object or with the process that made it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._finalizer: weakref.finalize | None = None
        self._numbers: dict[str, int] = {}
        self._refused: dict[str, str] = {}

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return shared_process, ()

    @property
    def pid(self) -> int | None:
        """The id of the process; None where none is running."""
        return None if self._process is None else self._process.pid

    @property
    def compiled(self) -> tuple[str, ...]:
        """The templates that the running process has compiled."""
        return tuple(self._numbers)

    def compile(self, template: str) -> None:
        """Compile a template, once.

        Raises:
          TemplateFailure: it cannot be compiled, is too long, or exceeds its budget.
        """
        self._run(template, None)

    def render(self, template: str, request: bytes) -> list[str | TemplateFailure]:
        """Render the conversations of a request.

        Args:
          template: source of the template.
          request: the request to `template_worker`, as JSON without its outer braces.

        Returns:
          The text of each conversation; the first failure ends the list.
        """
        try:
            return self._run(template, request)
        except TemplateFailure as failure:
            return [failure]

    def forget(self) -> None:
        """Start over after a fork: the process is the parent's, and the thread that held the lock is gone."""
        self._lock = threading.Lock()
        if self._process is not None:
            self._process.returncode = 0  # not ours to wait for
            self._stop()

    def _run(self, template: str, request: bytes | None) -> list[str | TemplateFailure]:
        with self._lock:
            try:
                try:
                    return self._attempt(template, request)
                except _Died:  # another program may have ended it, so try once more
                    return self._attempt(template, request)
            except _Died as died:
                raise TemplateFailure(f"it ends the process that renders it ({died})", is_structural=True) from died
            except TemplateFailure:
                raise
            except BaseException:  # an interrupt: the reply to this request must not be read as that to the next
                self._stop()
                raise

    def _attempt(self, template: str, request: bytes | None) -> list[str | TemplateFailure]:
        if template not in self._numbers:
            if len(self._numbers) >= TEMPLATES:
                self._stop()
            self._compile(template)
        if request is None:
            return []
        assert self._process is not None  # it has compiled the template
        return self._ask(self._process, b'{"template": %d, %b}' % (self._numbers[template], request))

    def _compile(self, template: str) -> None:
        if template in self._refused:
            raise TemplateFailure(self._refused[template], is_structural=True)
        if len(template) > TEMPLATE_CHARACTERS:
            raise TemplateFailure(
                f"it has {len(template)} characters, expected at most {TEMPLATE_CHARACTERS}", is_structural=True
            )
        if len(self._refused) >= TEMPLATES:
            self._refused.clear()
        process = self._process or self._start()
        (answer,) = self._ask(process, json.dumps({"source": template}).encode())
        if isinstance(answer, TemplateFailure):
            self._refused[template] = str(answer)
            raise answer
        self._numbers[template] = len(self._numbers)

    def _ask(self, process: subprocess.Popen[bytes], request: bytes) -> list[str | TemplateFailure]:
        """Send one request and read its reply."""
        assert process.stdin is not None and process.stdout is not None
        try:
            _write(process.stdin.fileno(), SIZE.pack(len(request)) + request)
            answers = _read_answers(process.stdout.fileno())
        except (OSError, EOFError) as error:
            self._stop()
            if CPU_SIGNAL is not None and process.returncode == -CPU_SIGNAL:
                return [_over_time(f"{CPU_SECONDS} s of processor time")]
            if isinstance(error, TimeoutError):
                return [_over_time(f"{WALL_SECONDS} s")]
            raise _Died(f"exit code {process.returncode}") from error
        if any(isinstance(answer, TemplateFailure) and answer.is_structural for answer in answers):
            self._stop()  # it may still hold the memory that the template took
        return answers

    def _start(self) -> subprocess.Popen[bytes]:
        # Isolated (-I, -S): no hooks of site-packages, nothing from the environment or the working directory.
        folders = dict.fromkeys(str(Path(str(module.__file__)).parents[1]) for module in (jinja2, markupsafe))
        command = [sys.executable, "-I", "-S", template_worker.__file__, *folders]
        try:
            # A session of its own: Ctrl-C goes to the trainer alone, which then ends this process.
            self._process = subprocess.Popen(
                command, bufsize=0, stdin=PIPE, stdout=PIPE, stderr=subprocess.DEVNULL, start_new_session=True
            )
        except OSError as error:
            reason = f"the process for it cannot be started: {error.strerror or error}"
            raise TemplateFailure(reason, is_structural=True) from error
        self._finalizer = weakref.finalize(self, _end, self._process, os.getpid())
        return self._process

    def _stop(self) -> None:
        self._numbers.clear()
        self._process = None
        if self._finalizer is not None:
            self._finalizer()


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() == owner:  # else this is a fork, and the process is its parent's
        process.kill()
        process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        pipe.close()


def _over_time(limit: str) -> TemplateFailure:
    return TemplateFailure(f"it takes more than {limit}", is_structural=True)


def _write(pipe: int, content: bytes) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(pipe, rest) :]


def _read_answers(pipe: int) -> list[str | TemplateFailure]:
    """Read the texts of a reply.

    Raises:
      TimeoutError: no reply comes in `WALL_SECONDS`.
      EOFError: the reply breaks off or is too long.
    """
    deadline, received, missing = time.monotonic() + WALL_SECONDS, bytearray(), SIZE.size
    while missing > 0:
        _wait(pipe, deadline)
        piece = os.read(pipe, READ_BYTES)
        received += piece
        if not piece or len(received) > MEMORY_BYTES:
            raise EOFError
        missing = SIZE.size - len(received)
        if missing <= 0:
            missing += SIZE.unpack_from(received)[0]
    answers: list[str | TemplateFailure] = []
    start = SIZE.size
    while start < len(received):
        size, status = HEADER.unpack_from(received, start)
        start += HEADER.size + size
        text = received[start - size : start].decode("utf-8", "surrogatepass")
        is_text = status == Status.TEXT
        answers.append(text if is_text else TemplateFailure(text, is_structural=status == Status.UNUSABLE))
    return answers


def _wait(pipe: int, deadline: float) -> None:
    if not hasattr(select, "poll"):  # Windows cannot wait for pipes; the process limits its own time there
        return
    waiting = select.poll()
    waiting.register(pipe, select.POLLIN)
    if not waiting.poll(max(0, 1000 * (deadline - time.monotonic()))):
        raise TimeoutError


# One template process serves all transforms. The reference is weak, so that the process ends with its last user.
_shared: weakref.WeakValueDictionary[str, TemplateProcess] = weakref.WeakValueDictionary()


def shared_process() -> TemplateProcess:
    """The template process that all transforms share; it ends with its last user."""
    process = _shared.get(SHARED)
    if process is None:
        process = _shared.setdefault(SHARED, TemplateProcess())
    return process


def _forget_parent() -> None:
    for process in _shared.values():
        process.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_parent)

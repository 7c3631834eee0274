"""Tries one target in forked processes that may die, and goes on after each death.

The supervisor imports what the target needs once, then forks. A child writes every input into shared memory before it
runs it, so that the input that killed it is known. usage: python -m tests.fuzz.supervise TARGET INPUTS SEED FOLDER
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import hashlib
import json
import logging
import mmap
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tiny programs that run once: compiling them is most of the work.
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "PYTHONFAULTHANDLER": ""}

import hypothesis
from hypothesis import HealthCheck, Phase

from tests.fuzz.inputs import encode, read_saved
from tests.fuzz.judge import FINDING, OK, REFUSED, ROW_FAULT, SECONDS, Verdict, crash_location, judge
from tests.fuzz.targets import Target, load

MEMORY = 2 << 30
DEAF_SECONDS = 6 * SECONDS  # by the clock, for what waits or does not hear the signal
BATCH = 500  # Hypothesis remembers what it drew, so a test of its own every so many
LARGEST_INPUT = 8 << 20
POLL = 0.02
FOUND = Path(__file__).parent / "found"  # what was found once is tried first
COUNTED = (OK, ROW_FAULT, REFUSED, FINDING)


class Progress(ctypes.Structure):
    """What a child shares with its supervisor."""

    _fields_ = [
        ("kept", ctypes.c_uint64),  # inputs of tests/fuzz/found that were started
        ("batch", ctypes.c_uint64),
        ("counts", ctypes.c_uint64 * len(COUNTED)),
        ("started", ctypes.c_double),  # of the input that is being run; 0 between two
        ("size", ctypes.c_uint64),
        ("input", ctypes.c_ubyte * LARGEST_INPUT),
    ]

    @property
    def ran(self) -> int:
        return sum(self.counts)

    def count(self, outcome: str) -> None:
        self.counts[COUNTED.index(outcome)] += 1

    def current(self) -> bytes:
        return bytes(memoryview(self.input)[: self.size])


class Findings:
    """One file a kind in a folder: the smallest input that shows it, and beside it what happened."""

    def __init__(self, folder: Path, suffix: str):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._suffix = folder, suffix
        self._log = folder / "findings.log"
        self._log.write_text("")

    def add(self, verdict: Verdict, data: bytes) -> None:
        """Count a finding, and keep its input if there is no smaller one."""
        with self._log.open("a") as log:
            log.write(json.dumps(verdict.kind) + "\n")
        path = self.path(verdict.kind)
        if not path.exists() or len(data) < path.stat().st_size:
            path.write_bytes(data)
            path.with_suffix(".txt").write_text(f"{verdict.kind}\n\n{verdict.detail}", "utf-8", "backslashreplace")

    def path(self, kind: str) -> Path:
        """Where the input of a kind is saved."""
        digest = hashlib.sha256(kind.encode()).hexdigest()[:6]
        return self.folder / f"{re.sub('[^A-Za-z0-9]+', '-', kind).strip('-')[:60]}-{digest}{self._suffix}"

    def by_kind(self) -> dict[str, dict[str, Any]]:
        """How often each kind was found, and where its smallest input is."""
        kinds = Counter(json.loads(line) for line in self._log.read_text().splitlines())
        return {kind: {"times": times, "input": str(self.path(kind))} for kind, times in kinds.most_common()}


def supervise(name: str, inputs: int, seed: int, folder: Path) -> dict[str, Any]:
    """Try `inputs` inputs on a target; what came of them, as JSON can hold it."""
    started = time.perf_counter()
    with _work_folder() as work:
        target = load(name, work)
        findings = Findings(folder / name, ".bin" if target.binary else ".json")
        progress = Progress.from_buffer(mmap.mmap(-1, ctypes.sizeof(Progress)))
        stderr = work.parent / f"{work.name}.stderr"
        ready = time.perf_counter()
        while progress.ran < inputs:
            child = os.fork()
            if child == 0:
                _child(target, inputs, seed, progress, findings, stderr)
            status = _watch(child, progress)
            if status is not None:
                verdict = _death(status, stderr)
                findings.add(verdict, progress.current())
                progress.count(FINDING)
                progress.started, progress.batch = 0, progress.batch + 1
        stderr.unlink(missing_ok=True)
    return {
        "target": name,
        "inputs": progress.ran,
        "start": round(ready - started, 1),
        "seconds": round(time.perf_counter() - ready, 1),
        "cpu": round(sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]), 1),
        **dict(zip(COUNTED, progress.counts)),
        "findings": findings.by_kind(),
    }


@contextlib.contextmanager
def _work_folder() -> Any:
    """A folder for the files under test and for what the code under test leaves behind, in memory where possible."""
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    work = Path(tempfile.mkdtemp(prefix="fuzz-", dir=place))
    tempfile.tempdir = os.environ["TMPDIR"] = str(work)
    os.environ["XDG_CACHE_HOME"] = str(work / "cache")
    try:
        yield work
    finally:
        tempfile.tempdir = None
        shutil.rmtree(work, ignore_errors=True)


def _watch(child: int, progress: Progress) -> int | str | None:
    """Wait for a child: None when it did its work, else the signal that killed it or why we did."""
    base = _resident(os.getpid())
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        started = progress.started
        reason = None
        if started and time.monotonic() - started > DEAF_SECONDS:
            reason = f"over {DEAF_SECONDS} s by the clock"
        elif _resident(child) - base > MEMORY:
            reason = "over 2 GB"
        if reason is not None:
            os.kill(child, signal.SIGABRT)  # faulthandler then says where
            time.sleep(0.2)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return reason
        time.sleep(POLL)
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status)
    if os.WEXITSTATUS(status) and not progress.started:
        raise SystemExit("the fuzzer itself failed; see above")
    return None if os.WEXITSTATUS(status) == 0 else f"exit code {os.WEXITSTATUS(status)}"


def _death(status: int | str, stderr: Path) -> Verdict:
    said = stderr.read_text("utf-8", "replace") if stderr.exists() else ""
    what = signal.Signals(status).name if isinstance(status, int) else status
    return Verdict(FINDING, f"{what} {crash_location(said)}", said[-4000:])


def _resident(pid: int) -> int:
    with contextlib.suppress(OSError, IndexError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
    return 0


def _child(target: Target, inputs: int, seed: int, progress: Progress, findings: Findings, stderr: Path) -> None:
    """Run inputs until there were enough; never returns."""
    complaint = os.dup(2)
    try:
        noise = os.open(stderr, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(noise, stream)
        faulthandler.enable()
        _quiet_what_is_ours()
        virtual = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (virtual + 2 * MEMORY, virtual + 2 * MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for path in sorted((FOUND / target.name).glob("*"))[progress.kept :]:
            progress.kept += 1
            _one(target, read_saved(path), progress, findings, noise)
        while progress.ran < inputs:
            size = min(BATCH, inputs - progress.ran)
            _batch(target, size, seed, progress, lambda given: _one(target, given, progress, findings, noise))
            progress.batch += 1
        os._exit(0)
    except BaseException as error:
        os.dup2(complaint, 2)
        sys.__excepthook__(type(error), error, error.__traceback__)
        progress.started = 0
        os._exit(70)


def _batch(target: Target, size: int, seed: int, progress: Progress, one: Callable[[Any], None]) -> None:
    digest = hashlib.sha256(f"{target.name} {seed} {progress.batch}".encode()).digest()

    @hypothesis.seed(int.from_bytes(digest[:8]))
    @hypothesis.settings(
        max_examples=size,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(target.strategy)
    def examples(given: Any) -> None:
        one(given)

    examples()


def _one(target: Target, given: Any, progress: Progress, findings: Findings, noise: int) -> None:
    data = encode(given)
    progress.size = len(data)
    ctypes.memmove(progress.input, data, len(data))
    os.ftruncate(noise, 0)  # what drawing the input has printed
    progress.started = time.monotonic()
    verdict = judge(target.run, given)
    progress.started = 0
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if written := os.fstat(noise).st_size:
        said = os.pread(noise, min(written, 4000), 0).decode("utf-8", "replace")
        if verdict.outcome != FINDING:
            verdict = Verdict(FINDING, f"noise: {_without_numbers(said)}", said)
    progress.count(verdict.outcome)
    if verdict.outcome == FINDING:
        findings.add(verdict, data)


def _quiet_what_is_ours() -> None:
    """What our own logger says is meant to be read; what other libraries print is a finding."""
    ours = logging.getLogger("easydel")
    ours.addHandler(logging.NullHandler())
    ours.propagate = False
    for unseen in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):  # as by default
        warnings.filterwarnings("ignore", category=unseen)


def _without_numbers(text: str) -> str:
    lines = text.strip().splitlines() or ["blank lines"]
    return re.sub(r"[^ -~]", "", re.sub(r"\d+", "N", lines[0]))[:48]


if __name__ == "__main__":
    name, inputs, seed, folder = sys.argv[1:]
    print(json.dumps(supervise(name, int(inputs), int(seed), Path(folder))))

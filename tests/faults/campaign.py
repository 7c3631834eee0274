"""The faults, and the judgement of what a run made of them: nothing may be lost, nothing may pass in silence."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.faults.runs import MODES, RUN, UPDATES, Ended, Ground, Result, copied, ended, result, updates_logged

SAME, FELL_BACK, REFUSED, SKIPPED, NOISY, LOST = "the same", "fell back", "refused", "skipped", "NOISY", "LOST"
OUTCOMES = (SAME, FELL_BACK, REFUSED, SKIPPED, NOISY, LOST)
FAULTY = (NOISY, LOST)
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
FLIP, CUT, GONE = "a flipped bit", "cut in half", "gone"
DISK_SIZES_KB = (200, 700, 1500)


@dataclass(frozen=True)
class Trial:
    """One fault and its outcome; `detail` is the message, or what differs."""

    fault: str
    where: str
    outcome: str
    detail: str = ""


def judge(fault: str, where: str, done: Ended, found: Result | None, expected: Result) -> Trial:
    """What became of a run that went on after a fault."""
    if done.is_refusal:
        return Trial(fault, where, REFUSED, done.message)
    if done.code:
        return _must_refuse(fault, where, done)
    if found is None:
        return Trial(fault, where, LOST, "exit code 0, but no weights or no log")
    if found.weights != expected.weights:
        return Trial(fault, where, LOST, "exit code 0, but other weights than the undisturbed run")
    if found.log != expected.log and "metrics.jsonl" not in done.said:
        return Trial(fault, where, LOST, f"exit code 0, but another log: {_difference(found.log, expected.log)}")
    words = ("damaged", "incomplete", "instead", "half-written", "checksum", "metrics.jsonl")
    said = [line for line in done.said.splitlines() if any(word in line for word in words)]
    return Trial(fault, where, FELL_BACK, said[0][:300]) if said else Trial(fault, where, SAME)


def kills(ground: Ground, mode: str, number: signal.Signals, rounds: int, rng: random.Random) -> Iterator[Trial]:
    """Kill a run at random moments, often more than once, and let it go on."""
    seconds, expected = ground.undisturbed(mode)
    for at in range(rounds):
        place = ground.folder / f"kill-{mode.replace(' ', '-')}-{number.name}-{at}"
        moments = []
        for _ in range(rng.choice((1, 1, 2))):
            process = ground.start(place, mode, "--resume-from-checkpoint", "latest")
            begun = time.monotonic()
            if wait_for_moment(process, place, seconds, rng):
                process.send_signal(number)
            moments.append(f"{time.monotonic() - begun:.1f} s, update {updates_logged(place)}")
            done = ended(process, place)
            if done.code == 0:
                break
            if number is signal.SIGKILL or done.code in (143, 130, -number):
                continue
            yield Trial(f"{number.name}", mode, LOST, f"exit code {done.code}: {_last_line(done.said)}")
        last = ground.resume(place, mode) if done.code else done
        yield judge(number.name, f"{mode} at {'; '.join(moments)}", last, result(place), expected)
        _remove(place)


def wait_for_moment(process: subprocess.Popen[bytes], place: Path, seconds: float, rng: random.Random) -> bool:
    """Wait for a random moment, more often within training than around it; whether the process is still there."""
    if rng.random() < 0.3:
        with suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(0.2, 1.05) * seconds)
        return process.poll() is None
    update = rng.randrange(UPDATES)
    while process.poll() is None and updates_logged(place) < update:
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 0.3))
    return process.poll() is None


def damages(ground: Ground, mode: str, most: int | None, rng: random.Random) -> Iterator[Trial]:
    """Damage each file of an interrupted run in each way, one at a time, and let it go on."""
    _, expected = ground.undisturbed(mode)
    original = ground.interrupted(mode)
    files = [path for path in sorted((original / RUN).rglob("*")) if path.is_file() and path.name != ".lock"]
    cases = [(file, how) for file in files for how in (FLIP, CUT, GONE) if how == GONE or file.stat().st_size]
    if most is not None and most < len(cases):
        cases = rng.sample(cases, most)
    for file, how in cases:
        with copied(original, "copy") as place:
            damage(place / file.relative_to(original), how, rng)
            done = ground.resume(place, mode)
            where = f"{mode}: {file.relative_to(original / RUN)}"
            yield judge(how, where, done, result(place), expected)


def damage(path: Path, how: str, rng: random.Random) -> None:
    """Flip one bit of a file, cut it in half or remove it."""
    if how == GONE:
        path.unlink()
        return
    data = bytearray(path.read_bytes())
    if how == CUT:
        path.write_bytes(data[: len(data) // 2])
    else:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)


def empty_folder_beside(ground: Ground) -> Iterator[Trial]:
    """An empty folder that looks like the newest checkpoint, and one that only has a file of notes."""
    _, expected = ground.undisturbed("plain")
    for what in ("empty", "half-written"):
        with copied(ground.interrupted("plain"), "beside") as place:
            newest = place / RUN / "checkpoints" / "99"
            newest.mkdir()
            if what == "half-written":
                (newest / "notes").mkdir()
                (newest / "notes" / "metadata").write_text("{")
            yield judge(f"an {what} checkpoint", "plain", ground.resume(place, "plain"), result(place), expected)


def lock_left_behind(ground: Ground) -> Iterator[Trial]:
    """The file of a lock that no process holds."""
    _, expected = ground.undisturbed("plain")
    with copied(ground.interrupted("plain"), "locked") as place:
        (place / RUN / ".lock").write_text("4711\n")
        yield judge("a lock left behind", "plain", ground.resume(place, "plain"), result(place), expected)


def two_at_once(ground: Ground) -> Iterator[Trial]:
    """Two processes go on from the latest checkpoint of one run: one works, the other is refused."""
    _, expected = ground.undisturbed("plain")
    with copied(ground.interrupted("plain"), "twice") as place:
        resume = ("--resume-from-checkpoint", "latest")
        first = ground.start(place, "plain", *resume)
        second = ground.start(place, "plain", *resume)
        codes = [first.wait(), second.wait()]
        said = Ended(0, "")
        runs = sorted(path.name for path in place.glob(f"{RUN}*"))
        if len(runs) > 1:
            yield Trial(
                "two processes", "resumed at once", LOST, f"the second made {runs[-1]} and trained beside the first"
            )
        elif sorted(codes) == [0, 2]:
            yield judge("two processes", "resumed at once", said, result(place), expected)
        else:
            # Both may have worked, one after the other had finished.
            outcome = judge("two processes", "resumed at once", said, result(place), expected)
            yield outcome if codes == [0, 0] else Trial("two processes", "resumed at once", LOST, f"exit codes {codes}")
    place = ground.folder / "second-while-first"
    first = ground.start(place, "plain")
    while first.poll() is None and not list((place / RUN / "checkpoints").glob("3")):
        time.sleep(0.02)
    first.send_signal(signal.SIGSTOP)  # it holds its lock, however slow the second is to start
    done = ground.run(place, "plain", "--resume-from-checkpoint", "latest")
    first.send_signal(signal.SIGCONT)
    first.wait()
    runs = sorted(path.name for path in place.glob(f"{RUN}*"))
    if done.is_refusal and len(runs) == 1:
        yield Trial("two processes", "the first at work", REFUSED, done.message)
    else:
        yield Trial(
            "two processes",
            "the first at work",
            LOST,
            f"exit code {done.code}, folders {runs}: {_last_line(done.said)}",
        )
    found = judge("two processes", "the first, undisturbed", Ended(0, ""), result(place), expected)
    yield found
    _remove(place)


def full_disk(ground: Ground) -> Iterator[Trial]:
    """The disk is full at several moments; once there is room, the run goes on."""
    _, expected = ground.undisturbed("plain")
    for size in DISK_SIZES_KB:
        with mounted(ground.folder / f"disk-{size}", f"size={size}k") as (disk, reason):
            if disk is None:
                yield Trial("a full disk", f"{size} KB", SKIPPED, reason)
                continue
            done = ground.run(disk / "runs", "plain")
            if done.code == 0:
                yield Trial("a full disk", f"{size} KB", LOST, "exit code 0 on a disk that is too small")
                continue
            yield _must_refuse("a full disk", f"{size} KB", done)
            subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
            again = ground.resume(disk / "runs", "plain")
            yield judge("a full disk", f"{size} KB, then room", again, result(disk / "runs"), expected)


def read_only(ground: Ground) -> Iterator[Trial]:
    """The folder of runs cannot be written to."""
    with mounted(ground.folder / "read-only", "size=50m") as (disk, reason):
        if disk is None:
            yield Trial("a read-only folder", "the run's folder", SKIPPED, reason)
            return
        shutil.copytree(ground.interrupted("plain"), disk / "runs")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for how, more in (("a new run", ()), ("resumed", ("--resume-from-checkpoint", "latest"))):
            # What it says is kept beside the folder, which is read-only too.
            place = ground.folder / f"outside-{how.replace(' ', '-')}"
            done = ground.run(place, "plain", "--save-directory", str(disk / "runs"), *more)
            yield _must_refuse("a read-only folder", how, done)


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[tuple[Path | None, str]]:
    """A small disk in memory at a folder, or None and the reason why there is none."""
    folder.mkdir(parents=True, exist_ok=True)
    if os.geteuid() != 0:
        yield None, "only root can mount a small disk"
        return
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode:
        yield None, f"no small disk can be mounted here: {done.stderr.strip()}"
        return
    try:
        yield folder, ""
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def campaign(ground: Ground, rounds: int, most_damages: int | None, seed: int, modes: list[str]) -> Iterator[Trial]:
    """Every fault: kills in every mode with every signal, damages in every file, and what surrounds a run."""
    rng = random.Random(seed)
    around: list[Callable[[Ground], Iterator[Trial]]] = [
        two_at_once,
        lock_left_behind,
        empty_folder_beside,
        full_disk,
        read_only,
    ]
    for fault in around:
        yield from fault(ground)
    for mode in modes:
        for number in SIGNALS:
            yield from kills(ground, mode, number, rounds, rng)
    for mode in ("plain", "adapters") if set(modes) == set(MODES) else modes:
        yield from damages(ground, mode, most_damages, rng)


def _must_refuse(fault: str, where: str, done: Ended) -> Trial:
    """The trial of a run that cannot go on here, and should say so shortly."""
    if done.is_refusal:
        return Trial(fault, where, REFUSED, done.message)
    lines = done.said.splitlines()
    foreign = next((line[:200] for line in lines if "easydel" not in line.split(":")[:2]), "")
    if done.message:
        return Trial(fault, where, NOISY, f"{len(lines)} lines, among them {foreign!r}, around: {done.message}")
    return Trial(fault, where, LOST, f"exit code {done.code} after {len(lines)} lines: {_last_line(done.said)}")


def _last_line(text: str) -> str:
    return next((line.strip()[:200] for line in reversed(text.splitlines()) if line.strip()), "nothing was said")


def _difference(found: list[dict], expected: list[dict]) -> str:
    if len(found) != len(expected):
        return f"{len(found)} lines, expected {len(expected)}"
    line, ours, theirs = next((n, a, b) for n, (a, b) in enumerate(zip(found, expected)) if a != b)
    names = [name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)]
    return f"line {line + 1} differs in {', '.join(sorted(names)[:5])}"


def _remove(place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    shutil.rmtree(place.with_name(f"{place.name}-cache"), ignore_errors=True)

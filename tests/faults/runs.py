"""Real runs of `easydel dpo` on a tiny model, and what is left of them."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tests.fuzz.made import model_folder

ROOT = Path(__file__).parents[2]
RUN = "run"
UPDATES = 12
SPEEDS = ("per_second", "mfu")
LIMIT_S = 600
LONGEST_OUTPUT = 4000  # with what a run logs before it is refused
FAST_COMPILATION = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"

# Every way a run can keep its state.
MODES: dict[str, tuple[str, ...]] = {
    "plain": (),
    "adapters": ("--lora-rank", "2", "--lora-dropout", "0.1"),
    "precomputed": ("--precompute-ref-log-probs",),
    "synced reference": ("--sync-ref-model", "--ref-model-sync-steps", "4"),
    "stream": (),
    "evaluation": ("--eval-dataset", "heldout.jsonl", "--evaluation-steps", "3"),
    "accumulation": ("--gradient-accumulation-steps", "2"),
}


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit code, negative for a signal, and what it said."""

    code: int
    said: str

    @property
    def message(self) -> str:
        """The last thing it said, as one line."""
        return " ".join(self.said[self.said.rfind("easydel: error:") :].split())[:300] if self.said else ""

    @property
    def is_refusal(self) -> bool:
        """Whether it ended with one short message and no traceback."""
        start = self.said.find("easydel: error:")
        return self.code in (1, 2) and start >= 0 and "Traceback" not in self.said and len(self.said) < LONGEST_OUTPUT


class Ground:
    """A folder with a model and rows, and the caches that its runs share."""

    def __init__(self, folder: Path):
        self.folder = folder.absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        model_folder(self.folder / "model")
        # An even number of distinct rows, answers of several lengths.
        things = [f"{kind} {number}" for kind in ("tea", "bread", "rain", "chess") for number in range(10)]
        lines = [
            json.dumps(
                {"prompt": f"Tell me of {thing}.", "chosen": f" {thing} is good.", "rejected": " No" * (2 + at % 5)}
            )
            for at, thing in enumerate(things)
        ]
        (self.folder / "train.jsonl").write_text("\n".join(lines[:36]) + "\n")
        (self.folder / "heldout.jsonl").write_text("\n".join(lines[36:]) + "\n")
        (self.folder / "train.jsonl.gz").write_bytes(gzip.compress((self.folder / "train.jsonl").read_bytes()))

    def start(self, place: Path, mode: str, *more: str) -> subprocess.Popen[bytes]:
        """A run that keeps its files in `place`; what it says goes to the file said.txt beside it."""
        rows = "train.jsonl.gz" if mode == "stream" else "train.jsonl"
        command = [sys.executable, "-m", "easydel", "dpo", "--model", "model", "--train-dataset", rows]
        command += ["--save-directory", str(place), "--model-name", RUN, "--no-progress-bar", "--dtype", "float32"]
        command += ["--total-batch-size", "4", "--num-train-epochs", "2", "--max-training-steps", str(UPDATES)]
        command += ["--learning-rate", "1e-3", "--save-steps", "3", *MODES[mode], *more]
        place.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": FAST_COMPILATION,
            "XDG_CACHE_HOME": str(place.with_name(f"{place.name}-cache")),  # reference log-probs are of this run alone
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        with _said(place).open("wb") as said:
            return subprocess.Popen(command, cwd=self.folder, env=environment, stdout=said, stderr=said)

    def run(self, place: Path, mode: str, *more: str) -> Ended:
        """A run from its start to its end."""
        return ended(self.start(place, mode, *more), place)

    def resume(self, place: Path, mode: str) -> Ended:
        """Go on from the latest checkpoint to the end."""
        return self.run(place, mode, "--resume-from-checkpoint", "latest")

    @cache  # noqa: B019  one ground a campaign
    def undisturbed(self, mode: str) -> tuple[float, Result]:
        """The seconds and the result of a run of this mode that nothing happens to, its programs compiled before."""
        for name in ("compiling", "undisturbed"):
            place, start = self.folder / f"{name}-{mode.replace(' ', '-')}", time.monotonic()
            done = self.run(place, mode)
            if done.code:
                raise RuntimeError(f"an undisturbed run of mode {mode} failed:\n{done.said}")
        return time.monotonic() - start, result(place)

    @cache  # noqa: B019
    def interrupted(self, mode: str) -> Path:
        """The files of a run that was stopped by SIGTERM half-way, with several checkpoints."""
        place = self.folder / f"interrupted-{mode.replace(' ', '-')}"
        process = self.start(place, mode)
        while process.poll() is None and not (place / RUN / "checkpoints" / "6").exists():
            time.sleep(0.01)
        process.terminate()
        done = ended(process, place)
        if done.code not in (143, 0):
            raise RuntimeError(f"a run of mode {mode} that got SIGTERM ended with {done.code}:\n{done.said}")
        return place


@dataclass(frozen=True)
class Result:
    """What a finished run leaves: its log without speeds, and its weights."""

    log: list[dict[str, Any]]
    weights: bytes


def result(place: Path) -> Result | None:
    """The result of the newest run; None where it left none. A run that lost its first updates begins a new folder."""
    try:
        folder = max(place.glob(f"{RUN}*"), key=lambda path: int(path.name.removeprefix(RUN).strip("-") or 1))
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        weights = b"".join(path.read_bytes() for path in sorted((folder / "model").glob("*.safetensors")))
    except (OSError, ValueError):
        return None
    return (
        None
        if not weights
        else Result(
            [{name: value for name, value in line.items() if not name.endswith(SPEEDS)} for line in lines], weights
        )
    )


def updates_logged(place: Path) -> int:
    """How many updates a run has written to its log."""
    with suppress(OSError, ValueError):
        return max((json.loads(line).get("step", 0) for line in _lines(place)), default=0)
    return 0


def _lines(place: Path) -> list[str]:
    return (place / RUN / "metrics.jsonl").read_text().splitlines()


def ended(process: subprocess.Popen[bytes], place: Path) -> Ended:
    """Wait for a run; one that hangs is killed and counts as that."""
    try:
        code = process.wait(LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return Ended(-9, f"still there after {LIMIT_S} s")
    return Ended(code, _said(place).read_text("utf-8", "replace"))


def _said(place: Path) -> Path:
    return place.with_name(f"{place.name}-said.txt")


@contextmanager
def copied(original: Path, name: str) -> Iterator[Path]:
    """A copy of a run's files, and of its cache, to damage."""
    copy = original.with_name(name)
    cache_of = lambda place: place.with_name(f"{place.name}-cache")  # noqa: E731
    for source, target in ((original, copy), (cache_of(original), cache_of(copy))):
        shutil.rmtree(target, ignore_errors=True)
        if source.exists():
            shutil.copytree(source, target)
    try:
        yield copy
    finally:
        for target in (copy, cache_of(copy)):
            shutil.rmtree(target, ignore_errors=True)
        _said(copy).unlink(missing_ok=True)

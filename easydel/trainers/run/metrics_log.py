"""Write the log of a run to ``metrics.jsonl``, keep it in checkpoints, and restore it from them."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from easydel.trainers.callbacks.callback import LogLine, RunningTrainer, Watcher

logger = logging.getLogger("easydel")

METRICS_FILE = "metrics.jsonl"
# A checkpoint keeps a copy of the latest lines, about a megabyte at most.
LINES_IN_CHECKPOINT = 1000


class JsonLinesTracker(Watcher):
    """Appends every line to ``metrics.jsonl`` in the run folder, at once, so that a killed run keeps its log.

    If the disk is full or the file was removed, one warning says so, and each later line tries to write all of them.

    Args:
      folder: the run folder.
      lines: the lines logged before an interruption.
    """

    def __init__(self, folder: Path, lines: Iterable[LogLine] = ()):
        self.path = folder / METRICS_FILE
        self._lines = [json_line(line) for line in lines]
        # Bytes in the file after the last write; None if the file must be written whole.
        self._size: int | None = None
        self._is_failing = False

    def on_train_begin(self, trainer: RunningTrainer) -> None:
        self._write_all_anew()

    def on_log(self, trainer: RunningTrainer, line: LogLine) -> None:
        self._lines.append(json_line(line))
        try:
            is_as_left = self.path.stat().st_size == self._size
        except OSError:
            is_as_left = False
        if is_as_left:
            self._append(self._lines[-1])
        else:
            self._write_all_anew()

    def on_train_end(self, trainer: RunningTrainer) -> None:
        if self._is_failing:
            self._write_all_anew()
        if self._is_failing:
            logger.error("%s lacks lines to the end; they are in trainer.log_history.", self.path)

    def __len__(self) -> int:
        return len(self._lines)

    def metadata(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of the log: the latest lines, and a digest of those before."""
        before = max(0, len(self._lines) - LINES_IN_CHECKPOINT)
        return {
            "before": before,
            "digest": _digest(self._lines[:before]),
            "latest": [json.loads(line) for line in self._lines[before:]],
        }

    def _append(self, line: str) -> None:
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
                file.flush()
                self._size = file.tell()
        except OSError as error:
            self._failed(error)

    def _write_all_anew(self) -> None:
        new = self.path.with_name(f"{METRICS_FILE}.new")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            new.write_text("".join(self._lines), encoding="utf-8")
            new.replace(self.path)
            self._size = self.path.stat().st_size
        except OSError as error:
            new.unlink(missing_ok=True)
            self._failed(error)
        else:
            if self._is_failing:
                logger.warning("%s can be written to again; no line is missing.", self.path)
            self._is_failing = False

    def _failed(self, error: OSError) -> None:
        self._size = None
        if not self._is_failing:
            logger.warning(
                "%s cannot be written to (%s): training continues, and its lines are written as soon as they can be.",
                self.path,
                error.strerror,
            )
        self._is_failing = True


def restored_log(run_folder: Path, last_step: int, metadata: Mapping[str, Any]) -> list[LogLine]:
    """Restore the log of a run up to a checkpoint: the latest lines from the checkpoint, earlier ones from the file.

    Args:
      run_folder: holds ``metrics.jsonl``.
      last_step: the checkpoint's update; lines of later updates are left out.
      metadata: as `JsonLinesTracker.metadata` gave it.

    Raises:
      ValueError: `metadata` is not that of `JsonLinesTracker`.
    """
    before, latest = metadata.get("before"), metadata.get("latest")
    if type(before) is not int or not isinstance(latest, list) or not all(map(is_log_line, latest)):
        raise ValueError("lines")
    kept, end = {json_line(line) for line in latest}, before + len(latest)
    lines = read_log(run_folder, last_step)
    new = [line if line is not None and json_line(line) not in kept else None for line in lines]
    older = [line for line in new[:end] if line is not None][:before]
    # Keep evaluations that the user asked for after the checkpoint; updates after it are made and logged again.
    own = [line for line in new[end:] if line is not None and not any(name.startswith("train/") for name in line)]
    if _digest(map(json_line, older)) != metadata.get("digest"):
        logger.warning(
            "%s was damaged: %d of the %d lines before update %d are there. The lines from then on are complete.",
            run_folder / METRICS_FILE,
            len(older),
            before,
            latest[0]["step"] if latest else last_step,
        )
    return [*older, *map(as_log_line, latest), *own]


def _digest(lines: Iterable[str]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for line in lines:
        digest.update(line.encode())
    return digest.hexdigest()


def read_log(run_folder: Path, last_step: int) -> list[LogLine | None]:
    """Read the lines of a run's log; None for a line that is of a later update, cut short, or no log line."""
    try:
        text = (run_folder / METRICS_FILE).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    lines: list[LogLine | None] = []
    for entry in text.splitlines():
        try:
            line = json.loads(entry)
        except (ValueError, RecursionError):
            line = None
        lines.append(as_log_line(line) if is_log_line(line) and line["step"] <= last_step else None)
    return lines


def is_log_line(value: Any) -> bool:
    """Return whether a JSON value can be a line of a log."""
    return isinstance(value, dict) and type(value.get("step")) is int


def as_log_line(read: dict[str, Any]) -> LogLine:
    """Return a line as it was logged: JSON has no NaN, so null becomes NaN again."""
    return {name: math.nan if value is None else value for name, value in read.items()}


def json_line(line: LogLine) -> str:
    """Write one line of the log as JSON; JSON has no NaN and no infinity, so a skipped update's loss is null."""
    return json.dumps({name: _finite(value) for name, value in line.items()}) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

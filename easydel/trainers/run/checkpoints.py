"""Write the checkpoints of a run in the background, each complete or absent; find and verify them."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jaxtyping import PyTree

from easydel.infra.state_files import ARRAYS, UNFINISHED, DamagedFolder, WriteError, damage_of, start_saving

logger = logging.getLogger("easydel")

FOLDER = "checkpoints"
METADATA = "notes/metadata"
FIELDS = ("place", "log", "lines", "identity", "options", "evaluations")


class Checkpoints:
    """The numbered checkpoints in ``<run folder>/checkpoints``.

    A checkpoint is a pytree's arrays, at full precision, metadata in JSON, and a manifest of both. `save` returns when
    the arrays have left the device; files are written and checksummed while training continues, under another name
    until they are complete. A write that fails is logged and leaves no files; the next checkpoint is tried again.

    Args:
      keep: how many of the latest are kept; None keeps all.
      lower_is_better: whether a lower rating is better.

    Attributes:
      failure: why the latest write failed, or None; `wait` raises it.
    """

    def __init__(self, keep: int | None, lower_is_better: bool):
        self._keep = keep
        self._sign = -1.0 if lower_is_better else 1.0
        self._root: Path | None = None
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._writing: Future[None] | None = None
        self.failure: WriteError | None = None

    def open(self, run_folder: Path) -> None:
        """Write into a run's folder from now on; remove what a killed run left half-written there."""
        self._root = run_folder.absolute() / FOLDER
        for leftover in self._root.glob(f"*{UNFINISHED}"):
            shutil.rmtree(leftover, ignore_errors=True)

    def save(self, step: int, tree: PyTree, metadata: Mapping[str, Any], ratings: Mapping[int, float]) -> Path:
        """Start to write checkpoint `step`; waits for the one before it, if that is still being written.

        Args:
          step: the checkpoint's number; one that exists already is left as it is.
          tree: arrays to keep.
          metadata: what else to keep, in JSON types.
          ratings: the rating metric of the checkpoints so far, by step; besides the latest, the best of them is kept.

        Returns:
          The checkpoint's folder, which appears when it is complete.

        Raises:
          ValueError: `open` has not been called.
        """
        if self._root is None:
            raise ValueError("these checkpoints have no folder yet; call open(run_folder) first.")
        folder = self._root / str(step)
        if self.has(step):
            return folder
        with self._noting_failure():
            finish = start_saving(folder, tree, {METADATA: json.dumps(dict(metadata))})
            self._writing = self._thread.submit(self._finish, finish, dict(ratings))
        return folder

    def has(self, step: int) -> bool:
        """Return whether checkpoint `step` is on disk; waits for what is still being written."""
        if self._writing is not None:
            self._writing.result()
        return self._root is not None and (self._root / str(step)).exists()

    def best(self, ratings: Mapping[int, float]) -> Path | None:
        """Return the folder of the best checkpoint, the latest among equals; None if none has a rating."""
        if self._root is None:
            return None
        steps = [int(folder.name) for folder in _numbered(self._root)]
        rated = [(self._sign * ratings[step], step) for step in steps if not math.isnan(ratings.get(step, math.nan))]
        return self._root / str(max(rated)[1]) if rated else None

    def wait(self) -> None:
        """Wait until all that was saved is on disk.

        Raises:
          WriteError: what was saved last could not be written.
        """
        if self._writing is not None:
            self._writing.result()
        if self.failure is not None:
            raise self.failure

    def _finish(self, finish: Callable[[], None], ratings: Mapping[int, float]) -> None:
        with self._noting_failure():
            finish()
            self._thin_out(ratings)

    @contextlib.contextmanager
    def _noting_failure(self) -> Iterator[None]:
        self.failure = None
        try:
            yield
        except WriteError as error:
            self.failure = error
            logger.error("checkpoint %s. Training continues, and the next checkpoint is tried again.", error)

    def _thin_out(self, ratings: Mapping[int, float]) -> None:
        if self._keep is None or self._root is None:
            return
        best = self.best(ratings)
        for folder in newest_checkpoints(self._root.parent)[self._keep :]:
            if folder != best:
                # Rename it first: a half-removed checkpoint must not look complete.
                unwanted = folder.with_name(folder.name + UNFINISHED)
                with contextlib.suppress(OSError):
                    folder.rename(unwanted)
                    shutil.rmtree(unwanted)


def newest_checkpoints(run_folder: Path) -> list[Path]:
    """List the checkpoints of a run, the latest first, intact or not."""
    return sorted(_numbered(run_folder / FOLDER), key=lambda folder: int(folder.name), reverse=True)


def latest_checkpoint(run_folder: Path) -> Path | None:
    """Return the latest intact checkpoint of a run, or None if it has none; reads all of it.

    Raises:
      DamagedFolder: there are checkpoints, and none of them is intact.
    """
    damaged: list[str] = []
    for folder in newest_checkpoints(run_folder):
        damage = damage_of(folder)
        if damage is None:
            if damaged:
                logger.warning("%s; taking %s, the newest that is intact.", "; ".join(damaged), folder)
            return folder
        damaged.append(f"{folder} is damaged ({damage})")
    if damaged:
        raise DamagedFolder(
            f"{'; '.join(damaged)}. No checkpoint of {run_folder} is intact: remove the folder, or start a new run "
            "without resume_from_checkpoint."
        )
    return None


def check_intact(checkpoint: Path) -> None:
    """Refuse a checkpoint that is not, byte by byte, what was written.

    Raises:
      FileNotFoundError: this is no checkpoint folder.
      DamagedFolder: says what is damaged, and names the newest intact one beside it.
    """
    if not checkpoint.is_dir() or not (checkpoint.name.isdecimal() or (checkpoint / ARRAYS).exists()):
        raise FileNotFoundError(f"{checkpoint} is no checkpoint; expected a folder such as runs/dpo/{FOLDER}/100.")
    damage = damage_of(checkpoint)
    if damage is None:
        return
    others = (other for other in newest_checkpoints(checkpoint.parent.parent) if other.name != checkpoint.name)
    intact = next((other for other in others if damage_of(other) is None), None)
    advice = "there is no intact one beside it" if intact is None else f"the newest intact one is {intact}"
    raise DamagedFolder(f"{checkpoint} is damaged ({damage}); {advice}.")


def rename_damaged(run_folder: Path, latest: Path) -> None:
    """Rename the checkpoints after the latest intact one: they are damaged, and the run will reuse their numbers."""
    for folder in newest_checkpoints(run_folder):
        if int(folder.name) > int(latest.name):
            names = (folder.with_name(f"{folder.name}.damaged{ending}") for ending in ("", *map(str, range(2, 1000))))
            folder.rename(next(name for name in names if not name.exists()))


def read_metadata(checkpoint: Path) -> dict[str, Any]:
    """Read the metadata of a checkpoint.

    Raises:
      DamagedFolder: the metadata is damaged.
    """
    try:
        metadata = json.loads((checkpoint / METADATA).read_text(encoding="utf-8"))
        for field in FIELDS:
            if not isinstance(metadata[field], dict):
                raise TypeError(f"{field} is no mapping")
    except KeyError as error:
        raise damaged_metadata(checkpoint, f"{error.args[0]} is missing") from error
    except (ValueError, TypeError, OSError, RecursionError) as error:
        raise damaged_metadata(checkpoint, str(error)) from error
    return metadata


def damaged_metadata(checkpoint: Path, reason: str) -> DamagedFolder:
    """Make the error for metadata that cannot be what was written."""
    return DamagedFolder(f"the metadata of {checkpoint} is damaged ({reason}); take an earlier checkpoint.")


def _numbered(root: Path) -> Iterator[Path]:
    return (folder for folder in root.glob("*") if re.fullmatch("[0-9]{1,18}", folder.name))

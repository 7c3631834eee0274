"""How far a run has come, where it keeps its files, and its checkpoints."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout
from jaxtyping import PyTree

from easydel.infra.state_files import load_arrays
from easydel.trainers.callbacks import LogLine
from easydel.trainers.checkpoints import ARRAYS, Checkpoints, latest_checkpoint, read_notes
from easydel.trainers.run_folder import find_checkpoint, make_run_folder, read_log, run_of, write_log
from easydel.trainers.run_identity import as_json, refuse_other_run
from easydel.trainers.stopping import lower_is_better
from easydel.trainers.training_arguments import TrainingArguments

Tree = TypeVar("Tree", bound=PyTree)
logger = logging.getLogger("easydel")
LOCK = ".lock"


@dataclasses.dataclass
class Place:
    """How far a run has come.

    Attributes:
      step: updates made.
      data: the data's position behind them.
      evaluated: the update last evaluated at.
    """

    step: int = 0
    data: dict[str, Any] | None = None
    evaluated: int | None = None


class RunRecord:
    """What is kept of a run, so that it can go on after an interruption.

    Attributes:
      place: how far the run has come.
      folder: the run's folder; None before `open`, and for a run that writes no files.
      checkpoints: what writes them.
      last_checkpoint, best_checkpoint: their folders, or None.
      evaluations: the numbers of the run's own evaluations, by update.
    """

    def __init__(self, arguments: TrainingArguments):
        best = arguments.best_metric
        self.place = Place()
        self.folder: Path | None = None
        self.checkpoints = Checkpoints(arguments.save_total_limit, best, best is not None and lower_is_better(best))
        self.last_checkpoint: Path | None = None
        self.best_checkpoint: Path | None = None
        self.evaluations: dict[int, dict[str, float]] = {}
        self._lock: FileLock | None = None
        self._arguments = arguments
        self._identity: dict[str, Any] = {}

    def open(self, identity: Mapping[str, Any]) -> Path | None:
        """Make the run's folder, or find the checkpoint that the run is to go on from: then `go_on` follows.

        Args:
          identity: what makes this run the run it is.

        Raises:
          FileNotFoundError: there is no checkpoint where the options say there is one.
        """
        resume, where = self._arguments.resume_from_checkpoint, (self._save_directory, self._arguments.model_name)
        self._identity = as_json(identity)
        checkpoint = None if resume is None else find_checkpoint(resume, *where)
        if checkpoint is not None:
            return checkpoint
        if resume is not None:
            logger.warning("there is no checkpoint of %s/%s yet: starting from the beginning.", *where)
        self._take(make_run_folder(*where))
        return None

    def load(self, checkpoint: Path, like: Tree, identity: Mapping[str, Any]) -> tuple[Tree, dict[str, Any]]:
        """The arrays of a checkpoint, laid out as `like`, and its notes.

        Raises:
          FileNotFoundError: there is no such checkpoint.
          ValueError: it is of another run, by what `identity` says of this one; names every difference.
        """
        notes = read_notes(checkpoint)
        refuse_other_run(checkpoint, notes["identity"], as_json(identity))
        return load_arrays(checkpoint / ARRAYS, like), notes

    def go_on(self, checkpoint: Path, notes: Mapping[str, Any]) -> list[LogLine]:
        """Take a loaded checkpoint's place; the log so far."""
        self.place = Place(**notes["place"])
        run = run_of(checkpoint)
        log = read_log(run, self.place.step)
        # Later checkpoints are never overwritten: going on from an earlier one is a run of its own.
        is_latest = checkpoint == latest_checkpoint(run)
        folder = run if is_latest else make_run_folder(self._save_directory, self._arguments.model_name)
        self._take(folder)
        write_log(folder, log)
        self.evaluations = {int(step): numbers for step, numbers in notes["evaluations"].items()}
        self.last_checkpoint = checkpoint
        return log

    def save(self, arrays: PyTree, log_notes: Mapping[str, Any]) -> None:
        """Start to write a checkpoint of the place the run has come to; one that is there already stays as it is."""
        notes = {
            "place": dataclasses.asdict(self.place),
            "log": log_notes,
            "identity": self._identity,
            "options": as_json(dataclasses.asdict(self._arguments)),
            "evaluations": {str(step): numbers for step, numbers in self.evaluations.items()},
        }
        rating = self.evaluations.get(self.place.step, {})
        self.last_checkpoint = self.checkpoints.save(self.place.step, arrays, notes, rating)

    def close(self) -> None:
        """Finish writing, find out what the best checkpoint is, and let other processes into the folder.

        Raises:
          OSError: a checkpoint could not be written.
        """
        try:
            self.best_checkpoint = self.checkpoints.best
        finally:
            try:
                self.checkpoints.close()
            finally:
                if self.folder is not None:
                    self.last_checkpoint = latest_checkpoint(self.folder) or self.last_checkpoint
                if self._lock is not None:
                    self._lock.release()

    def _take(self, folder: Path) -> None:
        """Work in this folder from now on, alone."""
        lock = FileLock(folder / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(
                f"another process is at work in {folder}; wait for it to end, or give this run another model_name."
            ) from error
        self._lock, self.folder = lock, folder
        self.checkpoints.open(folder)

    @property
    def is_saved(self) -> bool:
        """Whether there is nothing to lose: no files are wanted, or the latest checkpoint is of this place."""
        saved = 0 if self.last_checkpoint is None else int(self.last_checkpoint.name)
        return self.folder is None or saved == self.place.step

    @property
    def _save_directory(self) -> str:
        assert self._arguments.save_directory is not None  # a run without it opens no record
        return self._arguments.save_directory

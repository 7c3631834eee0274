"""Keep a record of a run: its progress, its folder and its checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from filelock import BaseFileLock
from jaxtyping import PyTree

from easydel.infra.state_files import WriteError, read_arrays
from easydel.options import check_options
from easydel.trainers.callbacks.callback import LogLine
from easydel.trainers.callbacks.stopping import lower_is_better
from easydel.trainers.run.checkpoints import (
    Checkpoints,
    check_intact,
    damaged_metadata,
    latest_checkpoint,
    newest_checkpoints,
    read_metadata,
    rename_damaged,
)
from easydel.trainers.run.folder import (
    LOCK,
    SECONDS_TO_LOOK,
    check_save_directory,
    make_run_folder,
    named_run,
    newest_run,
    run_of,
    take_lock,
)
from easydel.trainers.run.identity import as_json, refuse_other_run
from easydel.trainers.run.metrics_log import JsonLinesTracker, restored_log
from easydel.trainers.training_arguments import TrainingArguments

Tree = TypeVar("Tree", bound=PyTree)
logger = logging.getLogger("easydel")


@dataclasses.dataclass
class Progress:
    """The progress of a run.

    Attributes:
      step: updates made.
      data: the data's position after them.
      evaluated: the update after which the last evaluation was made; None before any.
    """

    step: int = 0
    data: dict[str, Any] | None = None
    evaluated: int | None = None


class RunRecord:
    """All that is kept of a run so that it can resume after an interruption.

    Attributes:
      progress: updates made, and the data's position after them.
      folder: the run's folder; None before `open`, and for a run that writes no files.
      log: writes ``metrics.jsonl`` there.
      checkpoints: writes the checkpoints.
      last_checkpoint, best_checkpoint: their folders, or None.
      evaluations: the numbers of the run's own evaluations, by update.
    """

    def __init__(self, arguments: TrainingArguments):
        best = arguments.best_metric
        self.progress = Progress()
        self.folder: Path | None = None
        self.log: JsonLinesTracker | None = None
        self.checkpoints = Checkpoints(arguments.save_total_limit, best is not None and lower_is_better(best))
        self.last_checkpoint: Path | None = None
        self.best_checkpoint: Path | None = None
        self.evaluations: dict[int, dict[str, float]] = {}
        self._arguments = arguments
        self._identity: dict[str, Any] = {}
        self._lock: BaseFileLock | None = None
        # Folders that this run made, removed again if the run is refused.
        self._made: list[Path] = []

    def open(self, identity: Mapping[str, Any]) -> Path | None:
        """Make the run's folder, or find the checkpoint that the run resumes from.

        No other process can work in the folder until `close`.

        Args:
          identity: all that determines the run's numbers.

        Returns:
          The checkpoint, with which the caller calls `load` and `resume`; None for a new run.

        Raises:
          FileNotFoundError: there is no checkpoint where the options name one.
          ValueError: another process is at work in the folder, or a checkpoint is damaged.
        """
        arguments = self._arguments
        self._identity = as_json(identity)
        if arguments.resume_from_checkpoint in (None, "latest"):
            with self._alone_in(self._directory()) as directory:
                run = newest_run(directory, arguments.model_name) if arguments.resume_from_checkpoint else None
                if run is None:
                    if arguments.resume_from_checkpoint:
                        logger.warning(
                            "there is no checkpoint of %s yet: starting from the beginning.",
                            directory / arguments.model_name,
                        )
                    self._make_folder(directory)
                    return None
                self._take(run)
            return latest_checkpoint(run)
        example = f"{arguments.save_directory}/{arguments.model_name}"
        run, checkpoint = named_run(arguments.resume_from_checkpoint, example)
        if checkpoint is None:
            self._take(run)
            return latest_checkpoint(run)
        # Later checkpoints are never overwritten: resuming from an earlier one makes a new run folder.
        if newest_checkpoints(run)[:1] == [checkpoint]:
            self._take(run)
        check_intact(checkpoint)
        return checkpoint

    def load(self, checkpoint: Path, like: Tree, identity: Mapping[str, Any]) -> tuple[Tree, dict[str, Any]]:
        """Read the arrays of an intact checkpoint, laid out as `like`, and its metadata.

        Raises:
          ValueError: the checkpoint's identity differs from `identity`; names every difference.
        """
        metadata = read_metadata(checkpoint)
        refuse_other_run(checkpoint, metadata["identity"], as_json(identity))
        return read_arrays(checkpoint, like), metadata

    def resume(self, checkpoint: Path, metadata: Mapping[str, Any]) -> list[LogLine]:
        """Continue from the progress of a loaded checkpoint.

        Returns:
          The log up to the checkpoint.

        Raises:
          DamagedFolder: the metadata is not that of a run.
        """
        try:
            self.progress = Progress(**metadata["place"])
            check_options(self.progress)
            self.evaluations = {int(step): _numbers(numbers) for step, numbers in metadata["evaluations"].items()}
            log = restored_log(run_of(checkpoint), self.progress.step, metadata["lines"])
        except (TypeError, ValueError) as error:
            raise damaged_metadata(checkpoint, str(error)) from error
        if self.folder is None:
            with self._alone_in(self._directory()) as directory:
                self._make_folder(directory)
        else:
            rename_damaged(self.folder, checkpoint)
        assert self.folder is not None
        self.log = JsonLinesTracker(self.folder, log)
        self.last_checkpoint = checkpoint
        return log

    def save(self, arrays: PyTree, log_metadata: Mapping[str, Any]) -> None:
        """Start to write a checkpoint of the run's progress; one of the same update stays as it is."""
        assert self.log is not None
        metadata = {
            "place": dataclasses.asdict(self.progress),
            "log": log_metadata,
            "lines": self.log.metadata(),
            "identity": self._identity,
            "options": as_json(dataclasses.asdict(self._arguments)),
            "evaluations": {str(step): numbers for step, numbers in self.evaluations.items()},
        }
        self.last_checkpoint = self.checkpoints.save(self.progress.step, arrays, metadata, self._ratings())

    @property
    def is_saved(self) -> bool:
        """True if nothing can be lost: no update was made, it has a checkpoint, or the run writes no files."""
        return self.folder is None or self.progress.step == 0 or self.checkpoints.has(self.progress.step)

    def close(self, error: BaseException | None) -> None:
        """Finish writing, find the best checkpoint, and unlock the folder.

        Args:
          error: what ended the run, or None. A run that is refused before its first update leaves no files.

        Raises:
          WriteError: the last checkpoint could not be written, and no other error ended the run.
        """
        try:
            self.checkpoints.wait()
        except WriteError as failure:
            if error is None:
                raise WriteError(
                    f"the last checkpoint, {failure}. The trained model is in trainer.model; make room and save it "
                    "with trainer.save_pretrained."
                ) from failure
        finally:
            if self.folder is not None:
                self.last_checkpoint = next(iter(newest_checkpoints(self.folder)), self.last_checkpoint)
                self.best_checkpoint = self.checkpoints.best(self._ratings())
            is_refused = self.progress.step == 0 and isinstance(error, (ValueError, OSError))
            is_empty = self.progress.step == 0 and not self.log
            if error is not None and (is_refused or is_empty):
                self._take_back()
            if self._lock is not None:
                self._lock.release()

    def _directory(self) -> Path:
        assert self._arguments.save_directory is not None  # a run without it opens no record
        directory = check_save_directory(self._arguments.save_directory)
        self._made += [folder for folder in (directory, *directory.parents) if not folder.exists()][::-1]
        directory.mkdir(parents=True, exist_ok=True)
        return directory

    @contextlib.contextmanager
    def _alone_in(self, directory: Path) -> Iterator[Path]:
        """Hold the lock of the folder of runs, so that processes that start together take one run folder each."""
        lock = take_lock(directory, SECONDS_TO_LOOK)
        try:
            yield directory
        finally:
            lock.release()

    def _make_folder(self, directory: Path) -> None:
        folder = make_run_folder(directory, self._arguments.model_name)
        self._made.append(folder)
        self._take(folder)

    def _take(self, folder: Path) -> None:
        """Lock this run folder and work in it from now on."""
        self._lock, self.folder, self.log = take_lock(folder), folder, JsonLinesTracker(folder)
        self.checkpoints.open(folder)

    def _take_back(self) -> None:
        """Remove the folders that this run made, except those that hold other files."""
        if self.folder in self._made:
            shutil.rmtree(self.folder, ignore_errors=True)
            self._made.remove(self.folder)
            self.folder = None
        for folder in reversed(self._made):
            if all(path.name == LOCK for path in folder.iterdir()):
                shutil.rmtree(folder, ignore_errors=True)

    def _ratings(self) -> dict[int, float]:
        metric = self._arguments.best_metric
        if metric is None:
            return {}
        return {step: numbers[metric] for step, numbers in self.evaluations.items() if metric in numbers}


def _numbers(value: Any) -> dict[str, float]:
    if not isinstance(value, dict) or not all(type(number) in (int, float) for number in value.values()):
        raise ValueError("evaluations")
    return value

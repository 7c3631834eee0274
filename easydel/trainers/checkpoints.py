"""Checkpoints of a run: written in the background, each of them whole or not there."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from jaxtyping import PyTree
from orbax.checkpoint import checkpoint_managers as policies

from easydel.infra.state_files import arrays_by_path

FOLDER, ARRAYS, NOTES = "checkpoints", "arrays", "notes"


class Checkpoints:
    """The numbered checkpoints in ``<run folder>/checkpoints``, through Orbax.

    A checkpoint is a pytree's arrays, at full precision, and notes in JSON. `save` returns when the arrays have left
    the device; files are written while training goes on, under another name until they are complete.

    Args:
      keep: how many of the latest are kept; None keeps all.
      best_metric: the best checkpoint by this metric is kept besides; None keeps no best one.
      lower_is_better: which end of the metric is the good one.
    """

    def __init__(self, keep: int | None, best_metric: str | None, lower_is_better: bool):
        self._best_metric = best_metric
        policy: Any = policies.LatestN(keep)
        rank: dict[str, Any] = {}
        if best_metric is not None:
            sign = -1.0 if lower_is_better else 1.0
            # A checkpoint of an earlier session may have been rated by another metric.
            rank = {"best_fn": lambda metrics: sign * metrics.get(best_metric, -sign * math.inf), "best_mode": "max"}
            best = policies.BestN(get_metric_fn=rank["best_fn"], n=1, keep_checkpoints_without_metrics=False)
            policy = policies.AnyPreservationPolicy([policy, best])
        self._options = ocp.CheckpointManagerOptions(preservation_policy=policy, cleanup_tmp_directories=True, **rank)
        self._manager: ocp.CheckpointManager | None = None

    def open(self, run_folder: Path) -> None:
        """Write from now on into a run's folder; what a killed run left half-written there is removed."""
        self.close()
        root = run_folder.absolute() / FOLDER
        self._manager = ocp.CheckpointManager(root, options=self._options, item_names=(ARRAYS, NOTES))

    def save(self, step: int, tree: PyTree, notes: Mapping[str, Any], metrics: Mapping[str, float]) -> Path:
        """Start to write checkpoint `step`; waits for the one before it, if that is still being written.

        Args:
          step: the checkpoint's number; one that exists already is left as it is.
          tree: arrays to keep.
          notes: what else to keep, in JSON types.
          metrics: the evaluation at this step, or nothing.

        Returns:
          The checkpoint's folder, which appears when it is complete.
        """
        manager = self._opened()
        if step not in manager.all_steps():
            arrays = ocp.args.StandardSave(arrays_by_path(tree))
            items = ocp.args.Composite(**{ARRAYS: arrays, NOTES: ocp.args.JsonSave(dict(notes))})
            rating = {name: value for name, value in metrics.items() if name == self._best_metric}
            with _naming(Path(manager.directory)):
                manager.save(step, args=items, metrics=rating or None, force=True)
        return manager.directory / str(step)

    @property
    def best(self) -> Path | None:
        """The folder of the best checkpoint by `best_metric`; None before the first that has one."""
        if self._manager is None or self._best_metric is None:
            return None
        self.wait()
        step = self._manager.best_step()
        return None if step is None else Path(self._manager.directory) / str(step)

    def wait(self) -> None:
        """Return when all that was saved is on disk."""
        manager = self._opened()
        with _naming(Path(manager.directory)):
            manager.wait_until_finished()

    def close(self) -> None:
        """Finish writing."""
        if self._manager is not None:
            manager, self._manager = self._manager, None
            with _naming(Path(manager.directory)):
                manager.close()

    def _opened(self) -> ocp.CheckpointManager:
        if self._manager is None:
            raise ValueError("these checkpoints have no folder yet; call open(run_folder) first.")
        return self._manager


def latest_checkpoint(run_folder: Path) -> Path | None:
    """The latest complete checkpoint of a run, or None."""
    steps = [folder for folder in (run_folder / FOLDER).glob("*") if re.fullmatch("[0-9]+", folder.name)]
    return max(steps, key=lambda folder: int(folder.name), default=None)


def read_notes(checkpoint: Path) -> dict[str, Any]:
    """The notes of a checkpoint.

    Raises:
      FileNotFoundError: this is no checkpoint folder.
      ValueError: the notes are damaged.
    """
    file = checkpoint / NOTES / "metadata"  # Orbax's name for an item in JSON
    if not (checkpoint / ARRAYS).is_dir() or not file.is_file():
        raise FileNotFoundError(f"{checkpoint} is no checkpoint; expected a folder such as runs/dpo/{FOLDER}/100.")
    try:
        notes = json.loads(file.read_text(encoding="utf-8"))
        if missing := {"place", "log", "identity", "options", "evaluations"} - notes.keys():
            raise ValueError(f"{', '.join(sorted(missing))} missing")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"the notes of {checkpoint} are damaged ({error}); take an earlier checkpoint.") from error
    return notes


@contextlib.contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Orbax's errors with the folder they are about."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise OSError(f"a checkpoint could not be written to {folder}: {reason}") from error

"""Write log lines to experiment trackers: TensorBoard."""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from easydel.trainers.callbacks.callback import LogLine, RunningTrainer, Watcher

logger = logging.getLogger("easydel")


class TensorBoardTracker(Watcher):
    """Writes every number as a TensorBoard scalar into the run folder."""

    package = "tensorboardX"

    def __init__(self, folder: Path):
        self._folder = folder
        self._writer: Any = None

    def on_train_begin(self, trainer: RunningTrainer) -> None:
        from tensorboardX.event_file_writer import EventsWriter

        # Not SummaryWriter: its thread dies at the first failed write, and the loop then waits for it forever.
        self._writer = EventsWriter(str(self._folder / "events"))

    def on_log(self, trainer: RunningTrainer, line: LogLine) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        for name, value in line.items():
            if name != "step" and isinstance(value, (int, float)):
                event = Event(wall_time=time.time(), step=line["step"], summary=scalar(name, value))
                self._writer.write_event(event)
        self._writer.flush()

    def on_train_end(self, trainer: RunningTrainer) -> None:
        if self._writer is not None:
            self._writer.close()


TRACKERS = {"tensorboard": TensorBoardTracker}


def check_trackers(report_to: Iterable[str]) -> None:
    """Refuse trackers whose package is missing or cannot be imported.

    Raises:
      ValueError: names the package and what to install.
    """
    for name in report_to:
        package = TRACKERS[name].package
        try:
            importlib.import_module(package)
        except Exception as error:  # a broken installation may raise anything
            raise ValueError(
                f"report_to={name} needs the package {package}, which cannot be imported ({error}): "
                f'pip install "easydel-dpo[{name}]", or leave report_to out.'
            ) from error

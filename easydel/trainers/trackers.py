"""Where log lines are kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from easydel.trainers.callbacks import LogLine, TrainerCallback

if TYPE_CHECKING:
    from easydel.trainers.trainer import Trainer

METRICS_FILE = "metrics.jsonl"


class JsonLinesTracker(TrainerCallback):
    """Appends every line to ``metrics.jsonl`` in the run folder, at once, so that a killed run keeps its log."""

    def __init__(self, folder: Path):
        self.path = folder / METRICS_FILE

    def on_log(self, trainer: Trainer, line: LogLine) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            # JSON knows no NaN; a skipped update's loss becomes null.
            known = {name: None if value != value else value for name, value in line.items()}
            file.write(json.dumps(known) + "\n")


class TensorBoardTracker(TrainerCallback):
    """Writes every number as a TensorBoard scalar into the run folder."""

    def __init__(self, folder: Path):
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise ImportError(
                'report_to=("tensorboard",) needs tensorboardX: pip install "easydel-dpo[tensorboard]".'
            ) from error
        self._writer = SummaryWriter(str(folder))

    def on_log(self, trainer: Trainer, line: LogLine) -> None:
        for name, value in line.items():
            if name != "step" and isinstance(value, (int, float)):
                self._writer.add_scalar(name, value, line["step"])

    def on_train_end(self, trainer: Trainer) -> None:
        self._writer.flush()


TRACKERS = {"tensorboard": TensorBoardTracker}

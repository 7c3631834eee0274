"""Where log lines are kept."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from easydel.trainers.callbacks import LogLine, TrainerCallback
from easydel.trainers.run_folder import METRICS_FILE, json_line

if TYPE_CHECKING:
    from easydel.trainers.trainer import Trainer


class JsonLinesTracker(TrainerCallback):
    """Appends every line to ``metrics.jsonl`` in the run folder, at once, so that a killed run keeps its log."""

    def __init__(self, folder: Path):
        self.path = folder / METRICS_FILE

    def on_log(self, trainer: Trainer, line: LogLine) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json_line(line))


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

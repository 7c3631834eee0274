"""Show progress: a bar on a terminal, a line every few seconds in a log."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import track as rich_track

from easydel.trainers.callbacks.callback import LogLine, RunningTrainer, Watcher

SECONDS_BETWEEN_LINES = 10.0

Item = TypeVar("Item")


class ProgressReporter(Watcher):
    """Shows the trainer's `progress_metrics`, the speed and the time left."""

    def __init__(self, console: Console | None = None):
        self._console = console or Console(stderr=True)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._numbers = ""
        self._started = self._last_line = time.monotonic()

    def on_train_begin(self, trainer: RunningTrainer) -> None:
        self._started, self._last_line = time.monotonic(), float("-inf")
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]training"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._bar.start()
            self._task = self._bar.add_task("training", total=trainer.total_steps, numbers="")

    def on_step_end(self, trainer: RunningTrainer, step: int) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step)

    def on_log(self, trainer: RunningTrainer, line: LogLine) -> None:
        if any(name.startswith("eval/") for name in line):
            self._say(f"step {line['step']} evaluation  " + _numbers(line, trainer.progress_metrics))
            return
        self._numbers = _numbers(line, trainer.progress_metrics)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, numbers=self._numbers)
            return
        now = time.monotonic()
        is_last = line["step"] == trainer.total_steps
        if is_last or now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            left = (now - self._started) / max(1, line["step"]) * (trainer.total_steps - line["step"])
            self._say(f"step {line['step']}/{trainer.total_steps}  {self._numbers}  {_duration(left)} left")

    def on_train_end(self, trainer: RunningTrainer) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True)


def track(items: Iterable[Item], label: str, total: int | None, console: Console | None = None) -> Iterator[Item]:
    """Yield the items unchanged, with a bar on a terminal or a line every 10 seconds elsewhere.

    Args:
      items: what to iterate.
      label: what the bar or line calls them.
      total: how many there are; None if unknown.
      console: where to print; None is standard error.
    """
    console = console or Console(stderr=True)
    last_line = time.monotonic()
    of = "" if total is None else f"/{total}"
    if console.is_terminal:
        yield from rich_track(items, label, total, console=console)
        return
    number = 0
    for number, item in enumerate(items, start=1):
        yield item
        if time.monotonic() - last_line >= SECONDS_BETWEEN_LINES:
            last_line = time.monotonic()
            console.print(f"{label}  {number}{of} batches", highlight=False, soft_wrap=True)
    console.print(f"{label}  {number} batches, done", highlight=False, soft_wrap=True)


def _numbers(line: LogLine, names: Mapping[str, str]) -> str:
    """``loss 0.6931  margin 0`` for the metrics in `names`; those of a named set follow the set's name."""
    shown: dict[str, list[str]] = {}
    for name, value in line.items():
        metric = next((metric for metric in names if name.endswith("/" + metric)), None)
        if metric is not None:
            dataset = name.removesuffix(metric).split("/", 1)[1].rstrip("/")
            shown.setdefault(dataset, []).append(f"{names[metric]} {value:.4g}")
    return "  ".join(f"{dataset}: {'  '.join(numbers)}".removeprefix(": ") for dataset, numbers in shown.items())


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"

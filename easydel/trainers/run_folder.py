"""Where a run keeps its files: which folder, and what an interrupted run left in it."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from easydel.trainers.callbacks import LogLine
from easydel.trainers.checkpoints import FOLDER, latest_checkpoint, read_notes

METRICS_FILE = "metrics.jsonl"


def make_run_folder(save_directory: str, model_name: str) -> Path:
    """A new folder ``save_directory/model_name``, numbered when that exists, so that nothing is overwritten."""
    # Absolute, so that a program that changes its working directory keeps its files together.
    base = Path(save_directory).expanduser().absolute() / model_name
    base.parent.mkdir(parents=True, exist_ok=True)
    folder, number = base, 1
    while True:
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1
            folder = base.with_name(f"{base.name}-{number}")


def find_checkpoint(resume_from: str, save_directory: str, model_name: str) -> Path | None:
    """The checkpoint that ``resume_from_checkpoint`` means.

    Args:
      resume_from: "latest" for the newest run of this name that has one, a run's folder for its latest checkpoint, or
        a checkpoint.

    Returns:
      Its folder; None when "latest" finds none, since a job that restarts itself says "latest" from the beginning.

    Raises:
      FileNotFoundError: a folder was named that holds no checkpoint.
    """
    if resume_from == "latest":
        return _latest_of_runs(Path(save_directory).expanduser().absolute(), model_name)
    folder = Path(resume_from).expanduser().absolute()
    if folder.parent.name == FOLDER and folder.is_dir():
        return folder
    found = latest_checkpoint(folder)
    if found is None:
        raise FileNotFoundError(
            f'resume_from_checkpoint={resume_from!r}: no checkpoint there. Give "latest", a run\'s folder such as '
            f"{save_directory}/{model_name}, or a checkpoint such as {save_directory}/{model_name}/{FOLDER}/100."
        )
    return found


def _latest_of_runs(directory: Path, model_name: str) -> Path | None:
    numbered = re.compile(re.escape(model_name) + r"(?:-(\d+))?")
    runs = [
        (int(match[1] or 1), folder) for folder in directory.glob("*") if (match := numbered.fullmatch(folder.name))
    ]
    for _, folder in sorted(runs, reverse=True):
        checkpoint = latest_checkpoint(folder)
        # "tea-2" may be the second run of "tea", or the first of a run of that name.
        if checkpoint is not None and read_notes(checkpoint)["options"]["model_name"] == model_name:
            return checkpoint
    return None


def run_of(checkpoint: Path) -> Path:
    """The run folder a checkpoint belongs to."""
    return checkpoint.parent.parent


def read_log(run_folder: Path, last_step: int) -> list[LogLine]:
    """The lines of a run's log up to an update; a line that a kill cut short is left out."""
    path, lines = run_folder / METRICS_FILE, []
    if not path.exists():
        return []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and line.get("step", math.inf) <= last_step:
            lines.append({name: math.nan if value is None else value for name, value in line.items()})
    return lines


def write_log(run_folder: Path, lines: list[LogLine]) -> None:
    """Replace a run's log, all at once."""
    new = run_folder / f"{METRICS_FILE}.new"
    new.write_text("".join(map(json_line, lines)), encoding="utf-8")
    new.replace(run_folder / METRICS_FILE)


def json_line(line: LogLine) -> str:
    """One line of the log; JSON knows no NaN and no infinity, so a skipped update's loss is null."""
    return json.dumps({name: _finite(value) for name, value in line.items()}) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""The time that a chat template with today's date is told: the run's own, which a resumed run keeps."""

from __future__ import annotations

import contextlib
import datetime
import logging
from pathlib import Path

from easydel.trainers.checkpoints import newest_checkpoints, read_notes
from easydel.trainers.run_folder import named_run, newest_run
from easydel.trainers.training_arguments import TrainingArguments

logger = logging.getLogger("easydel")
TEMPLATE_TIME = "chat_template_time"


def time_of_run(arguments: TrainingArguments, now: datetime.datetime) -> datetime.datetime:
    """The time kept with the checkpoint that a run goes on from; `now`, to the second, for a new run."""
    kept = _kept_time(arguments)
    if kept is None:
        return now.replace(microsecond=0)
    if kept.date() != now.date():
        logger.warning(
            "the chat template shows the date: the run goes on with %s, when it began; today is %s.",
            kept.date(),
            now.date(),
        )
    return kept


def _kept_time(arguments: TrainingArguments) -> datetime.datetime | None:
    for checkpoint in _checkpoints(arguments):
        # A damaged one is told when the run goes on from it, and an older one of the same run has the same time.
        with contextlib.suppress(ValueError, TypeError, KeyError):
            return datetime.datetime.fromisoformat(read_notes(checkpoint)["identity"][TEMPLATE_TIME])
    return None


def _checkpoints(arguments: TrainingArguments) -> list[Path]:
    """Those that the run may go on from, the first that is intact; none where it cannot or does not."""
    resume, directory = arguments.resume_from_checkpoint, arguments.save_directory
    if directory is None or resume is None:
        return []
    # What is wrong with the folder is told when the run goes on from it.
    with contextlib.suppress(OSError, ValueError):
        checkpoint: Path | None = None
        if resume == "latest":
            run = newest_run(Path(directory).expanduser().absolute(), arguments.model_name)
        else:
            run, checkpoint = named_run(resume, f"{directory}/{arguments.model_name}")
        if run is not None:
            return newest_checkpoints(run) if checkpoint is None else [checkpoint]
    return []

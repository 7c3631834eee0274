"""The time that a chat template with today's date is told: the run's own, which a resumed run keeps."""

from __future__ import annotations

import contextlib
import datetime
import logging

from easydel.trainers.checkpoints import read_notes
from easydel.trainers.run_folder import find_checkpoint
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
    if arguments.save_directory is None or arguments.resume_from_checkpoint is None:
        return None
    # What is wrong with the checkpoint is told when the run goes on from it.
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        where = arguments.resume_from_checkpoint, arguments.save_directory, arguments.model_name
        checkpoint = find_checkpoint(*where)
        if checkpoint is not None:
            return datetime.datetime.fromisoformat(read_notes(checkpoint)["identity"][TEMPLATE_TIME])
    return None

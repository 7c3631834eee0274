"""Choose the time that a chat template with today's date shows: a resumed run keeps the time it began with."""

from __future__ import annotations

import contextlib
import datetime
import logging

from easydel.infra.state_files import DamagedFolder
from easydel.paths import user_path
from easydel.trainers.run.checkpoints import newest_checkpoints, read_metadata
from easydel.trainers.run.folder import named_run, newest_run
from easydel.trainers.training_arguments import TrainingArguments

logger = logging.getLogger("easydel")
TEMPLATE_TIME = "chat_template_time"


def time_of_run(arguments: TrainingArguments, now: datetime.datetime) -> datetime.datetime:
    """Return the time kept with the checkpoint that a run resumes from, or `now`, to the second, for a new run."""
    kept = _kept_time(arguments)
    if kept is None:
        return now.replace(microsecond=0)
    if kept.date() != now.date():
        logger.warning(
            "the chat template shows the date: the run continues with %s, when it began; today is %s.",
            kept.date(),
            now.date(),
        )
    return kept


def _kept_time(arguments: TrainingArguments) -> datetime.datetime | None:
    directory, resume_from = arguments.save_directory, arguments.resume_from_checkpoint
    if directory is None or resume_from is None:
        return None
    # A fault of the run's folder is reported when the run resumes in it.
    with contextlib.suppress(OSError, ValueError):
        if resume_from == "latest":
            run = newest_run(user_path(directory).absolute(), arguments.model_name)
        else:
            run, _ = named_run(resume_from, f"{directory}/{arguments.model_name}")
        # All checkpoints of a run have the same time, and the newest may be damaged.
        for checkpoint in [] if run is None else newest_checkpoints(run):
            with contextlib.suppress(DamagedFolder, KeyError, TypeError, ValueError):
                return datetime.datetime.fromisoformat(read_metadata(checkpoint)["identity"][TEMPLATE_TIME])
    return None

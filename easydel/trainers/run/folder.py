"""Find, make and lock the folder of a run."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from filelock import FileLock, Timeout

from easydel.infra.state_files import DamagedFolder
from easydel.paths import user_path
from easydel.trainers.run.checkpoints import FOLDER, newest_checkpoints, read_metadata

LOCK = ".lock"
# Generous: another process holds the lock only for the milliseconds in which it looks for a folder.
SECONDS_TO_LOOK = 60.0


def check_save_directory(save_directory: str) -> Path:
    """Return the absolute path of the folder of runs, which need not exist yet.

    Raises:
      NotADirectoryError: it, or a folder it is to be made in, is a file.
      PermissionError: nothing can be written there.
    """
    # Absolute, so that a program that changes its working directory keeps its files together.
    directory = user_path(save_directory).absolute()
    existing = existing_folder(directory)
    if not existing.is_dir():
        raise NotADirectoryError(f"save_directory={save_directory}: {existing} is no folder; name another one.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"save_directory={save_directory}: {existing} cannot be written to; name another folder.")
    return directory


def existing_folder(path: Path) -> Path:
    """Return the nearest of an absolute path and its parents that exists; it may be a file."""
    return next(folder for folder in (path, *path.parents) if os.path.lexists(folder))


def make_run_folder(save_directory: Path, model_name: str) -> Path:
    """Make the folder ``save_directory/model_name``, numbered if that exists, so that nothing is overwritten.

    Raises:
      OSError: it cannot be made.
    """
    folder, number = save_directory / model_name, 1
    while True:
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1
            folder = save_directory / f"{model_name}-{number}"
        except OSError as error:
            raise type(error)(f"the run folder {folder} cannot be made: {error.strerror}.") from error


def take_lock(folder: Path, seconds: float = 0.0) -> FileLock:
    """Acquire the lock of a folder; the lock of a killed process is free.

    Args:
      folder: the folder to lock.
      seconds: how long to wait for another process.

    Raises:
      ValueError: another process holds it.
      OSError: the file system has no locks, or nothing can be written.
    """
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=seconds)
    except Timeout as error:
        raise ValueError(
            f"another process is at work in {folder}; wait for it to end, or give this run another model_name."
        ) from error
    except (OSError, NotImplementedError) as error:
        raise OSError(f"{folder / LOCK} cannot be locked: {error}.") from error
    return lock


def named_run(resume_from: str, example: str) -> tuple[Path, Path | None]:
    """Return the run folder that ``resume_from_checkpoint`` names, and the checkpoint if it names one.

    Args:
      resume_from: the option's value, a run folder or a checkpoint.
      example: a run folder for the error to show.

    Raises:
      FileNotFoundError: there is neither.
    """
    folder = user_path(resume_from).absolute()
    if folder.parent.name == FOLDER and folder.is_dir():
        return run_of(folder), folder
    if not newest_checkpoints(folder):
        raise FileNotFoundError(
            f'resume_from_checkpoint={resume_from!r}: no checkpoint there. Give "latest", a run\'s folder such as '
            f"{example}, or a checkpoint such as {example}/{FOLDER}/100."
        )
    return folder, None


def newest_run(directory: Path, model_name: str) -> Path | None:
    """Return the newest run of a name that has checkpoints, or None.

    Raises:
      ValueError: another process is at work in a newer one, which has none yet.
    """
    numbered = re.compile(re.escape(model_name) + r"(?:-(\d{1,18}))?")
    runs = [
        (int(match[1] or 1), folder) for folder in directory.glob("*") if (match := numbered.fullmatch(folder.name))
    ]
    for _, folder in sorted(runs, reverse=True):
        checkpoints = newest_checkpoints(folder)
        # "tea-2" may be the second run of "tea", or the first of a run of that name.
        if checkpoints and _name_in(checkpoints) in (model_name, None):
            return folder
        if not checkpoints and (folder / LOCK).exists():
            take_lock(folder).release()
    return None


def _name_in(checkpoints: list[Path]) -> str | None:
    """The model_name of the run that wrote these; None if none of them can be read."""
    for checkpoint in checkpoints:
        with contextlib.suppress(DamagedFolder):
            name = read_metadata(checkpoint)["options"].get("model_name")
            if isinstance(name, str):
                return name
    return None


def run_of(checkpoint: Path) -> Path:
    """Return the run folder a checkpoint belongs to."""
    return checkpoint.parent.parent

"""Save and load the arrays of a pytree in a folder, through Orbax, with a manifest of every file's checksum."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from easydel.errors import listed
from easydel.infra.mesh import parameter_path
from easydel.paths import user_path

PyTreeT = TypeVar("PyTreeT", bound=PyTree)

ARRAYS, MANIFEST = "arrays", "manifest.json"
# Ends the name of a folder that is still being written, or that a killed process left behind.
UNFINISHED = ".unfinished"


class DamagedFolder(ValueError):
    """A folder of arrays differs from what was written; the message names the first difference."""


class WriteError(OSError):
    """A folder of arrays could not be written; nothing is left of it."""


def save_arrays(folder: str | Path, tree: PyTree) -> None:
    """Write every array of a pytree, in its own dtype, and a manifest; the folder appears only when it is complete.

    Raises:
      FileExistsError: `folder` exists; nothing is overwritten.
      WriteError: the disk is full, or the folder cannot be written to.
    """
    folder = user_path(folder).absolute()
    if folder.exists():
        raise FileExistsError(f"{folder} exists; name a new folder, or remove this one first.")
    start_saving(folder, tree, {})()


def load_arrays(folder: str | Path, like: PyTreeT) -> PyTreeT:
    """Read arrays into the structure, dtypes and shardings of another pytree.

    Raises:
      FileNotFoundError: there is no such folder.
      DamagedFolder: a file of it is missing or was changed.
      ValueError: it holds other arrays than `like`; names them.
    """
    folder = user_path(folder).absolute()
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no saved state at {folder}.")
    if damage := damage_of(folder):
        raise DamagedFolder(f"the saved state in {folder} is damaged ({damage}); take an earlier one.")
    return read_arrays(folder, like)


def read_arrays(folder: Path, like: PyTreeT) -> PyTreeT:
    """Read arrays as `load_arrays` does, from a folder that has been verified."""
    wanted = arrays_by_path(like)
    with _plain_path(folder) as path, ocp.StandardCheckpointer() as checkpointer:
        arrays = path / ARRAYS
        metadata = checkpointer.metadata(arrays).item_metadata
        if metadata is None:
            raise DamagedFolder(f"the saved state in {folder} is damaged (the list of its arrays is missing).")
        _check_same_arrays(folder, metadata.tree, wanted)
        shapes = {path: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding) for path, a in wanted.items()}
        restored = checkpointer.restore(arrays, shapes)
    return jax.tree.unflatten(jax.tree.structure(like), [restored[path] for path in wanted])


def start_saving(folder: Path, tree: PyTree, files: Mapping[str, str]) -> Callable[[], None]:
    """Begin to write a folder: its arrays have left the devices when this returns.

    Args:
      folder: absolute path; the folder appears, all at once, when the returned function has finished.
      tree: arrays to save.
      files: texts to save beside them, by file name.

    Returns:
      A function that waits for the files, adds the manifest and gives the folder its name; call it once, on any thread.

    Raises:
      WriteError: from this function or the returned one; what was written is removed.
    """
    new = folder.with_name(folder.name + UNFINISHED)
    arrays = arrays_by_path(tree)
    size = sum(array.nbytes for array in arrays.values())

    def failed(error: Exception) -> WriteError:
        _remove(new)
        return WriteError(f"{folder} ({size / 1e6:.1f} MB) could not be written: {_reason(error, folder.parent)}")

    # Held until the folder is finished, since threads of Orbax log a failure whenever it happens.
    to_the_end = contextlib.ExitStack()
    to_the_end.enter_context(_quiet_orbax())
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        for name, text in files.items():
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            (new / name).write_text(text, encoding="utf-8")
        # A folder that another thread fails to create would make all others wait for minutes.
        options = ocp.AsyncOptions(create_directories_asynchronously=False)
        checkpointer = ocp.StandardCheckpointer(async_options=options)
        checkpointer.save(to_the_end.enter_context(_plain_path(new)) / ARRAYS, arrays)
    except Exception as error:  # Orbax has no type of its own for a disk that is full
        with to_the_end:
            raise failed(error) from error

    def finish() -> None:
        with to_the_end:
            try:
                checkpointer.close()
                manifest = json.dumps({"files": folder_contents(new)}, separators=(",", ":"))
                (new / MANIFEST).write_text(manifest, encoding="utf-8")
                new.rename(folder)
            except Exception as error:
                raise failed(error) from error

    return finish


def _remove(folder: Path) -> None:
    """Remove a folder again and again, until writes that were still under way no longer add to it."""
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.1)
        if not folder.exists():
            return


def damage_of(folder: Path) -> str | None:
    """The first difference of a folder from its manifest; None where every byte is as written. Reads all of it."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        expected = {name: (entry["size"], entry["blake2b"]) for name, entry in manifest["files"].items()}
    except FileNotFoundError:
        return f"it has no {MANIFEST}: it was not written to its end, or by an older version"
    except OSError as error:
        return f"{MANIFEST} cannot be read: {error.strerror}"
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return f"{MANIFEST} is damaged"
    try:
        # The files that are there, not the manifest's names, which could lead out of the folder.
        found = {_name(path, folder): path for path in folder.rglob("*") if path.is_file()}
        if missing := sorted(expected.keys() - found.keys()):
            return f"{missing[0]} is missing"
        for name, (size, _) in expected.items():
            if (length := found[name].stat().st_size) != size:
                return f"{name} has {length} bytes, expected {size}"
        for name, (_, digest) in expected.items():
            if _digest(found[name]) != digest:
                return f"{name} was changed: its checksum is another"
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"
    return None


def arrays_by_path(tree: PyTree) -> dict[str, jax.Array]:
    """The arrays of a pytree under their paths, in the pytree's own order."""
    return {parameter_path(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def folder_contents(folder: Path) -> dict[str, dict[str, Any]]:
    """Size in bytes and checksum of every file of a folder, by its path within the folder."""
    return {
        _name(path, folder): {"size": path.stat().st_size, "blake2b": _digest(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()


def _reason(error: Exception, folder: Path) -> str:
    """The reason of a failed write, in a few words; tensorstore's messages have many lines."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if isinstance(error, OSError) and error.strerror:
        reason = error.strerror
    else:
        text = str(error)
        known = ("No space left on device", "Disk quota exceeded", "Read-only file system", "Permission denied")
        reason = next((words for words in known if words in text), text.strip().splitlines()[0][:200] if text else "")
    return f"{reason or type(error).__name__} ({shutil.disk_usage(existing).free / 1e6:.1f} MB free)"


class _NotOfOrbax(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return f"{os.sep}orbax{os.sep}" not in record.pathname


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Keep Orbax from logging one failure many times, with tracebacks: we raise it once."""
    log, quiet, show = logging.getLogger("absl"), _NotOfOrbax(), sys.unraisablehook

    def show_others(unraisable: Any) -> None:
        # Writes that were under way report their end to an event loop that the failure has closed.
        if str(unraisable.exc_value) != "Event loop is closed":
            show(unraisable)

    log.addFilter(quiet)
    sys.unraisablehook = show_others
    try:
        yield
    finally:
        log.removeFilter(quiet)
        if sys.unraisablehook is show_others:
            sys.unraisablehook = show


@contextlib.contextmanager
def _plain_path(folder: Path) -> Iterator[Path]:
    """A path to a folder that Orbax can use: it takes a path with "[" for a pattern, which nothing matches."""
    if "[" not in str(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="easydel-") as elsewhere:
        link = Path(elsewhere) / "folder"
        link.symlink_to(folder)
        yield link


def _check_same_arrays(folder: Path, saved: Mapping[str, Any], wanted: Mapping[str, jax.Array]) -> None:
    problems = [f"{path} is not in the saved state" for path in sorted(wanted.keys() - saved.keys())]
    problems += [f"{path} is saved, but not part of this state" for path in sorted(saved.keys() - wanted.keys())]
    problems += [
        f"{path} is saved as {saved[path].dtype}{list(saved[path].shape)}, this state has "
        f"{array.dtype}{list(array.shape)}"
        for path, array in wanted.items()
        if path in saved and (tuple(saved[path].shape), saved[path].dtype) != (array.shape, array.dtype)
    ]
    if problems:
        raise ValueError(f"{folder} holds the state of another model or optimiser:\n  {listed(problems, most=10)}")

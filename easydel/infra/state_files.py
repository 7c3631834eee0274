"""A pytree's arrays on disk, by their paths, through Orbax."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from easydel.infra.mesh import parameter_path
from easydel.infra.problems import listed

Tree = TypeVar("Tree", bound=PyTree)


def save_arrays(folder: str | Path, tree: PyTree) -> None:
    """Write every array of a pytree, at full precision; the folder appears only when it is whole.

    Raises:
      FileExistsError: there is something at `folder`; nothing is overwritten.
    """
    folder = Path(folder).expanduser().absolute()
    if folder.exists():
        raise FileExistsError(f"{folder} exists; name a new folder, or remove this one first.")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, arrays_by_path(tree))


def load_arrays(folder: str | Path, like: Tree) -> Tree:
    """Read arrays into the structure, dtypes and shardings of another pytree.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: it holds other arrays than `like`, which are named, or is damaged.
    """
    folder = Path(folder).expanduser().absolute()
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no saved state at {folder}.")
    wanted = arrays_by_path(like)
    with ocp.StandardCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(folder).item_metadata
        if metadata is None:
            raise _damaged(folder, "the list of its arrays is missing")
        _check_same_arrays(folder, metadata.tree, wanted)
        shapes = {path: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding) for path, a in wanted.items()}
        try:
            arrays = checkpointer.restore(folder, shapes)
        except Exception as error:  # Orbax has no type of its own for files that are gone or cut short
            raise _damaged(folder, str(error).splitlines()[0]) from error
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[path] for path in wanted])


def _damaged(folder: Path, reason: str) -> ValueError:
    return ValueError(f"the saved state in {folder} is damaged ({reason}); take an earlier one.")


def arrays_by_path(tree: PyTree) -> dict[str, jax.Array]:
    """The arrays of a pytree under their paths, in the pytree's own order."""
    return {parameter_path(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


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

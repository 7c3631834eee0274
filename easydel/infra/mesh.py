"""Make the device mesh, and lay out arrays on it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from easydel.ops.mesh_axes import AXIS_NAMES, DATA_AXES

# A rule table: the first pattern that is found in a parameter's path gives the partition of its last dimensions.
# Leading dimensions, such as the axis over stacked layers, are whole on every device.
PartitionRules = Sequence[tuple[str, PartitionSpec]]


def create_mesh(
    sharding_axis_dims: Sequence[int] = (1, -1, 1, 1, 1), devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh with axes ``("dp", "fsdp", "ep", "tp", "sp")``.

    Args:
      sharding_axis_dims: size of each axis; one of them may be -1 and takes the devices that are left.
      devices: the devices to use; None takes all.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    count, dims = len(devices), list(sharding_axis_dims)
    problem = None
    if len(dims) != len(AXIS_NAMES) or dims.count(-1) > 1 or any(d < 1 and d != -1 for d in dims):
        problem = "give five positive sizes, at most one of them -1"
    else:
        fixed = math.prod(d for d in dims if d != -1)
        if -1 in dims and count % fixed == 0:
            dims[dims.index(-1)] = count // fixed
        if math.prod(dims) != count:
            problem = f"their product must be the number of devices, {count}"
    unused = [axis for axis, size in zip(AXIS_NAMES, dims) if axis in ("ep", "sp") and size > 1]
    if not problem and unused:
        problem = f"nothing is split over {' and '.join(unused)} yet; leave 1 there"
    if problem:
        raise ValueError(f"sharding_axis_dims={tuple(sharding_axis_dims)} for axes {AXIS_NAMES}: {problem}.")
    return jax.make_mesh(dims, AXIS_NAMES, devices=devices, axis_types=(AxisType.Auto,) * len(AXIS_NAMES))


def mesh_of(tree: PyTree) -> Mesh | None:
    """The mesh that a pytree's arrays already lie on, or None."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding):
            mesh = leaf.sharding.mesh
            return mesh if isinstance(mesh, Mesh) else None
    return None


def parameter_path(path: tuple[Any, ...]) -> str:
    """``layers.self_attn.q_proj.weight`` for a key path of `jax.tree_util`."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def parameter_sharding(path: str, shape: Sequence[int], rules: PartitionRules, mesh: Mesh) -> NamedSharding:
    """The sharding that a rule table gives one parameter; an axis that does not divide its dimension is left out.

    Example:
      >>> mesh = jax.make_mesh((1, 1), ("fsdp", "tp"))
      >>> rules = [(r"up_proj\\.weight", PartitionSpec("tp", "fsdp"))]
      >>> [tuple(parameter_sharding("up_proj.weight", shape, rules, mesh).spec) for shape in ((8, 4), (2, 8, 4))]
      [('tp', 'fsdp'), (None, 'tp', 'fsdp')]
    """
    spec = tuple(next((spec for pattern, spec in rules if re.search(pattern, path)), ()))
    missing = len(shape) - len(spec)
    aligned = (None,) * missing + spec if missing >= 0 else spec[-missing:]
    axes = [axis if axis is not None and size % mesh.shape[axis] == 0 else None for axis, size in zip(aligned, shape)]
    return NamedSharding(mesh, PartitionSpec(*axes))


def tree_shardings(tree: PyTree, rules: PartitionRules, mesh: Mesh) -> PyTree:
    """A sharding for every array of a pytree, by its path; leaves may be arrays or `jax.ShapeDtypeStruct`."""

    def one(path, leaf):
        return parameter_sharding(parameter_path(path), leaf.shape, rules, mesh)

    return jax.tree_util.tree_map_with_path(one, tree)


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, Array]:
    """Send a batch to the devices with its rows split over the data axes: each device gets its own rows alone."""
    return jax.device_put(dict(batch), batch_sharding(mesh))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding that splits the rows of a batch over the data axes."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXES))


def constrain(x: Array, *axes: tuple[str, ...] | None) -> Array:
    """Constrain the layout of an intermediate array where a mesh is in use (`jax.set_mesh`) and divides it.

    Args:
      x: the array; unchanged without a mesh, or where the mesh does not divide it.
      *axes: mesh axes to split each dimension over, None for none.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    for size, names in zip(x.shape, axes):
        if names is not None and size % math.prod(mesh.shape[name] for name in names):
            return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))

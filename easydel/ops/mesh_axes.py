"""Name the axes of a mesh, and those that operations split rows and heads over."""

from __future__ import annotations

import math

import jax
from jax.sharding import AbstractMesh, Mesh

AXIS_NAMES = ("dp", "fsdp", "ep", "tp", "sp")
DATA_AXES = ("dp", "fsdp")
HEAD_AXIS = "tp"


def data_parallel_size(mesh: Mesh | AbstractMesh | None = None) -> int:
    """The number of devices that rows are split over; None takes the mesh in use, and without a mesh it is 1."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    return math.prod(mesh.shape[axis] for axis in DATA_AXES if axis in mesh.shape)

"""The axes of a mesh that operations split their work over; `easydel.infra.mesh` names them."""

from __future__ import annotations

import math

import jax

ROW_AXES = ("dp", "fsdp")
HEAD_AXIS = "tp"


def row_shares() -> int:
    """Devices of the mesh in use that rows are split over; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in ROW_AXES if axis in mesh.shape)

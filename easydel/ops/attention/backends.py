"""Which form of attention over trees runs where, and how it is split over a mesh."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.extend import backend
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from easydel.ops.attention.cudnn import cudnn_takes, tree_attention_cudnn
from easydel.ops.attention.tpu import tree_attention_tpu
from easydel.ops.attention.xla import tree_attention_xla
from easydel.ops.mesh_axes import HEAD_AXIS, ROW_AXES, row_shares

# (q, k, v, segment_ids, branch_ids, position_ids, window) -> attended values, as `tree_attention`.
Form = Callable[..., Array]
AMPERE = 8.0


def device_form(q: Float[Array, "rows length heads head_dim"]) -> Form:
    """The form made for the platform, or XLA's own operations where they are the best there is.

    Chosen while tracing, by the devices of the mesh in use (`jax.set_mesh`) or else the default ones, and not by
    `jax.lax.platform_dependent`: that traces every form, and cuDNN's cannot be traced where there is no cuDNN.

    The latter on CPU; on GPUs that are not NVIDIA's, or older than Ampere; for dtypes and heads that cuDNN does not
    take, float32 above all; and on several devices without a mesh in use: nothing then says how rows and heads lie.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty and jax.device_count() > 1:
        return tree_attention_xla
    device = None if mesh.empty else mesh.abstract_device
    platform = jax.default_backend() if device is None else device.platform
    if platform == "tpu":
        return tree_attention_tpu
    if platform == "gpu" and cudnn_takes(q) and _has_flash_kernels():
        return tree_attention_cudnn
    return tree_attention_xla


def _has_flash_kernels() -> bool:
    if "cuda" not in backend.get_backend().platform_version:
        return False
    return float(jax.local_devices(backend="gpu")[0].compute_capability) >= AMPERE


def over_mesh(form: Form) -> Form:
    """A form that works on one device, run on each device of the mesh in use with its own rows and heads.

    What an axis does not divide is not split over it. Where it divides the query heads but not the key heads, those
    are repeated first.
    """

    def split(q, k, v, segment_ids, branch_ids, position_ids, window=None):
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1:
            return form(q, k, v, segment_ids, branch_ids, position_ids, window)
        ids = (segment_ids, branch_ids, position_ids)
        row_axes = tuple(axis for axis in ROW_AXES if axis in mesh.shape)
        rows = row_axes if q.shape[0] % row_shares() == 0 else None
        shares = mesh.shape.get(HEAD_AXIS, 1)
        heads = HEAD_AXIS if shares > 1 and q.shape[2] % shares == 0 else None
        if heads is not None and k.shape[2] % shares != 0:
            k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
        values, tokens = P(rows, None, heads, None), P(rows, None)
        windows = () if window is None else (jnp.int32(window),)
        on_each_device = jax.shard_map(
            form,
            in_specs=(values, values, values, tokens, tokens, tokens, *(P() for _ in windows)),
            out_specs=values,
            check_vma=False,  # the kernels' outputs do not say over which axes they vary
        )
        return on_each_device(q, k, v, *ids, *windows)

    return split

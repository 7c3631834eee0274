"""Attend over rows of trees: the function that models call, the table of its backends, and their split over a mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from easydel.ops.attention.cached import cached_attention
from easydel.ops.attention.cudnn import cudnn_unmet, tree_attention_cudnn
from easydel.ops.attention.inputs import DEFAULT_OPTIONS, AttentionOptions, TokenIds
from easydel.ops.attention.tpu import tree_attention_tpu
from easydel.ops.attention.xla import tree_attention_xla
from easydel.ops.mesh_axes import DATA_AXES, HEAD_AXIS, data_parallel_size

AttentionBackend = Literal["cudnn", "tpu", "xla"]
# (q, k, v, ids, options) -> attention output, as `tree_attention`.
Run = Callable[[Array, Array, Array, TokenIds, AttentionOptions], Array]
AMPERE = 8.0  # compute capability


class AttentionCall(NamedTuple):
    """The properties of a call that decide which backends support it.

    Attributes:
      dtype: of queries, keys and values.
      head_dim: size of a head.
      options: window, scale and soft-cap.
      device: the device that the call will run on; None for several devices without a mesh in use, where nothing says
        how rows and heads lie on them.
    """

    dtype: Any
    head_dim: int
    options: AttentionOptions
    device: AbstractDevice | None


class Backend(NamedTuple):
    """One way to compute attention over trees.

    Attributes:
      unmet: lists in words what the backend needs and a call does not give; empty where it supports the call.
      run: computes the call on one device.
    """

    unmet: Callable[[AttentionCall], list[str]]
    run: Run

    def supports(self, call: AttentionCall) -> bool:
        """Whether the backend can compute a call."""
        return not self.unmet(call)


def _cudnn_unmet(call: AttentionCall) -> list[str]:
    is_fit = call.device is not None and call.device.platform == "gpu" and has_flash_kernels(call.device)
    device = [] if is_fit else [f"an NVIDIA GPU of the Ampere generation or later, got {_words(call.device)}"]
    return device + cudnn_unmet(call.dtype, call.head_dim, call.options)


def _tpu_unmet(call: AttentionCall) -> list[str]:
    is_fit = call.device is not None and call.device.platform == "tpu"
    return [] if is_fit else [f"a TPU, got {_words(call.device)}"]


# The automatic choice takes the first that supports a call.
BACKENDS: dict[AttentionBackend, Backend] = {
    "cudnn": Backend(_cudnn_unmet, tree_attention_cudnn),
    "tpu": Backend(_tpu_unmet, tree_attention_tpu),
    "xla": Backend(lambda _call: [], tree_attention_xla),
}


def tree_attention(
    q: Float[Array, "rows queries heads head_dim"],
    k: Float[Array, "rows length kv_heads head_dim"],
    v: Float[Array, "rows length kv_heads head_dim"],
    ids: TokenIds,
    options: AttentionOptions = DEFAULT_OPTIONS,
    *,
    query_start: Int[Array, ""] | None = None,
    backend: AttentionBackend | None = None,
) -> Float[Array, "rows queries heads head_dim"]:
    """Softmax attention over rows of trees: all branches see the trunk and never each other.

    .. math:: o_q = \\textstyle\\sum_k p_{qk} v_k, \\qquad p_q = \\mathrm{softmax}_k(c \\tanh(a\\, q \\cdot k / c))

    The sum is over the keys that `tree_mask` lets q see: those of its segment, at or before it in the row, in the trunk
    or in its own branch, and fewer than ``window`` positions back. ``a`` is `options.scale`, ``c`` is
    `options.soft_cap`.

    Args:
      q, k, v: queries, keys and values; ``heads`` is a multiple of ``kv_heads`` (grouped-query attention).
      ids: of the tokens of whole rows, ``[rows, length]``, which are the keys.
      options: window, scale and soft-cap.
      query_start: slot of the first query, where k and v are a cache and q holds only its newest tokens, in the slots
        from there on; None where q holds whole rows. Slots of segment 0 are empty: no token sees them.
      backend: key of `BACKENDS` for whole rows; None takes the first that supports dtype, head size, options and device
        of the mesh in use (`jax.set_mesh`), or else the default device. The numbers are the same up to rounding. With
        a cache it is not used: `cached_attention` computes that case everywhere.

    Returns:
      The attention output in q's dtype; the softmax is in float32.

    Raises:
      ValueError: there is no such backend, or the call does not give what it needs.

    References:
      Dao, FlashAttention-2, 2023. Gemma Team, Gemma 2, 2024 (soft-cap).

    Example:
      A trunk of one token with two branches, each of which sees the trunk's value 0 and its own:

      >>> ids = TokenIds(*(jnp.array([x]) for x in ([1, 1, 1], [0, 1, 2], [0, 1, 1])))
      >>> q = k = jnp.zeros((1, 3, 1, 8))
      >>> v = jnp.array([0.0, 1.0, 5.0]).reshape(1, 3, 1, 1) * jnp.ones(8)
      >>> tree_attention(q, k, v, ids)[0, :, 0, 0].tolist()
      [0.0, 0.5, 2.5]
    """
    if query_start is not None:
        return cached_attention(q, k, v, ids, options, query_start)
    call = AttentionCall(q.dtype, q.shape[-1], options, device_in_use())
    return over_mesh(choose_backend(call, backend).run)(q, k, v, ids, options)


def choose_backend(call: AttentionCall, name: AttentionBackend | None = None) -> Backend:
    """The backend of this name, or else the first in `BACKENDS` that supports a call.

    `jax.lax.platform_dependent` cannot choose: it traces every backend, and cuDNN's does not trace where it is absent.

    Raises:
      ValueError: there is no such backend, or the call does not give what it needs.
    """
    if name is None:
        return next(backend for backend in BACKENDS.values() if backend.supports(call))
    check_backend_name(name)
    if unmet := BACKENDS[name].unmet(call):
        raise ValueError(
            f"attention_backend={name!r} cannot compute this attention; it needs {'; and '.join(unmet)}. "
            "Leave attention_backend=None, which takes a backend that can (XLA always can)."
        )
    return BACKENDS[name]


def check_backend_name(name: str | None) -> None:
    """Refuse a name that is not in `BACKENDS`; None is the automatic choice.

    Raises:
      ValueError: there is no such backend.
    """
    if name is not None and name not in BACKENDS:
        raise ValueError(f"attention_backend={name!r}: expected None or one of {', '.join(map(repr, BACKENDS))}.")


def device_in_use() -> AbstractDevice | None:
    """The kind of device of the mesh in use, or else of the only device; None for several devices without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.abstract_device is not None:
        return mesh.abstract_device
    if mesh.empty and jax.device_count() > 1:
        return None
    device = jax.devices()[0]
    return AbstractDevice(device_kind=device.device_kind, num_cores=None, platform=device.platform)


def has_flash_kernels(gpu: AbstractDevice) -> bool:
    """Whether a GPU is NVIDIA's, of the Ampere generation or later.

    An abstract device does not hold the generation. A device of the same kind on this machine does; without one, as
    when compiling for another machine, the GPU counts as new.
    """
    here = next((device for device in jax.devices() if device.device_kind == gpu.device_kind), None)
    if here is None:
        return "NVIDIA" in gpu.device_kind
    return "cuda" in here.client.platform_version and float(here.compute_capability) >= AMPERE


def over_mesh(run: Run) -> Run:
    """Run a backend that works on one device on each device of the mesh in use, with that device's rows and heads.

    Rows or heads that an axis does not divide are not split over it. Where the axis divides the query heads but not the
    key heads, the key heads are repeated first.
    """

    def split(q: Array, k: Array, v: Array, ids: TokenIds, options: AttentionOptions) -> Array:
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1:
            return run(q, k, v, ids, options)
        data_axes = tuple(axis for axis in DATA_AXES if axis in mesh.shape)
        rows = data_axes if q.shape[0] % data_parallel_size(mesh) == 0 else None
        shards = mesh.shape.get(HEAD_AXIS, 1)
        heads = HEAD_AXIS if shards > 1 and q.shape[2] % shards == 0 else None
        if heads is not None and k.shape[2] % shards != 0:
            k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
        values, tokens = P(rows, None, heads, None), P(rows, None)
        on_each_device = jax.shard_map(
            run,
            in_specs=(values, values, values, tokens, P()),
            out_specs=values,
            check_vma=False,  # the kernels do not declare the axes that their outputs vary over
        )
        # The window is the only leaf of the options; shard_map takes arrays.
        return on_each_device(q, k, v, ids, jax.tree.map(jnp.int32, options))

    return split


def _words(device: AbstractDevice | None) -> str:
    return "several devices without a mesh in use" if device is None else f"{device.device_kind} ({device.platform})"

"""Hold the reference model: live, shared with the policy, or offloaded to disk; let it follow the policy."""

from __future__ import annotations

import logging
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from easydel.errors import brief
from easydel.infra.base_module import EasyDeLBaseModule
from easydel.infra.base_state import EasyDeLState
from easydel.infra.mesh import mesh_of, parameter_path
from easydel.infra.state_files import load_arrays, save_arrays
from easydel.layers.lora import adapters, adapters_are_at_start, copy_trainable

logger = logging.getLogger("easydel")


class Reference:
    """The model that a policy is held near, in one of three states.

    ``live``: frozen weights on the devices. ``shared``: the policy's own weights with adapters off. ``offloaded``:
    weights on disk, which `model` restores and `release` frees again. `offload` leads from live to offloaded,
    `replace` from any state to live.

    Args:
      state: the frozen model; None shares the policy's weights.
      is_initial_policy: whether it is the policy before its first update.
    """

    def __init__(self, state: EasyDeLState | None, is_initial_policy: bool):
        self.is_initial_policy = is_initial_policy
        self._live = state
        self._offloaded: OffloadedModel | None = None

    @property
    def status(self) -> Literal["live", "shared", "offloaded"]:
        """The state it is in."""
        if self._live is not None:
            return "live"
        return "shared" if self._offloaded is None else "offloaded"

    @property
    def state(self) -> EasyDeLState | None:
        """The frozen model while it is live, else None."""
        return self._live

    def model(self, policy: EasyDeLBaseModule) -> EasyDeLBaseModule:
        """Return the weights to score with; offloaded ones are restored and stay in memory until `release`."""
        if self._live is not None:
            return self._live.model
        return policy.without_lora() if self._offloaded is None else self._offloaded.restore()

    def replace(self, state: EasyDeLState) -> None:
        """Make another model the reference; the status becomes live."""
        self._live, self._offloaded = state, None

    def let_follow(self, policy: EasyDeLBaseModule) -> None:
        """Make a live model one that `mix` can move; see `movable`."""
        if self._live is not None:
            self._live = EasyDeLState.create(movable(self._live.model, policy))

    def offload(self) -> None:
        """Write live weights to a private temporary folder and free their memory.

        A reference that shares its weights with a policy with adapters stays: there is nothing to free. If the weights
        cannot be written, one warning says so and they stay too.
        """
        if self._live is None or self._live.model.has_lora:
            return
        try:
            self._offloaded = OffloadedModel(self._live.model)
        except OSError as error:
            logger.warning("the reference's weights stay in memory: %s.", error)
            return
        arrays = [weakref.ref(leaf) for leaf in jax.tree.leaves(self._live.model)]
        self._live = None
        if held := sum(leaf.nbytes for array in arrays if (leaf := array()) is not None):
            logger.warning(
                "the trainer no longer needs the reference's weights, but your program still holds them (%d MB): "
                "remove your own variables for the model that was passed to the trainer.",
                held // 1_000_000,
            )

    def release(self) -> None:
        """Free offloaded weights that `model` restored."""
        if self._offloaded is not None:
            self._offloaded.release()


class OffloadedModel:
    """A model's weights in a private temporary folder, which is removed with this object.

    Raises:
      OSError: they cannot be written.
    """

    def __init__(self, model: EasyDeLBaseModule):
        parent = tempfile.mkdtemp(prefix="easydel-reference-")
        weakref.finalize(self, shutil.rmtree, parent, ignore_errors=True)
        self._folder = Path(parent) / "weights"
        save_arrays(self._folder, model)
        self._skeleton = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), model
        )
        self._restored: EasyDeLBaseModule | None = None

    def restore(self) -> EasyDeLBaseModule:
        """Return the weights, read from disk on first use and laid out as they were."""
        if self._restored is None:
            self._restored = load_arrays(self._folder, self._skeleton)
        return self._restored

    def release(self) -> None:
        """Free what was restored."""
        self._restored = None


def reference_for(
    policy: EasyDeLBaseModule,
    reference: EasyDeLBaseModule | EasyDeLState | None,
    mesh: Mesh,
    trained: EasyDeLBaseModule,
) -> Reference:
    """Make the frozen reference of a policy.

    None and the policy's own object both mean the initial policy. Its buffers are used as they are: the trainer updates
    a copy, so they do not change. Nothing is read from disk and no optimiser state is kept. If only adapters are
    trained, the reference shares all else with the policy; if they still add nothing, nothing is kept: the reference is
    the policy with adapters off.

    Args:
      policy: the model as it was given.
      reference: the reference_model as it was given, or None.
      mesh: the devices.
      trained: the trainer's own model, before the first update.

    Raises:
      ValueError: the reference has another vocabulary than the policy.
    """
    model = reference.model if isinstance(reference, EasyDeLState) else reference
    is_initial_policy = model is None or model is policy
    if is_initial_policy and trained.has_lora:
        if adapters_are_at_start(trained):
            return Reference(None, is_initial_policy=True)
        # Dropout acts on the policy alone, so that even its first step may differ from the reference.
        has_dropout = any(adapter.dropout > 0 for adapter in adapters(trained).values())
        return Reference(EasyDeLState.create(copy_trainable(trained)), is_initial_policy=not has_dropout)
    model = policy if model is None else model
    if model.config.vocab_size != policy.config.vocab_size:
        raise ValueError(
            f"reference_model has a vocabulary of {model.config.vocab_size} tokens, model has "
            f"{policy.config.vocab_size}; they must read the same token ids."
        )
    if mesh_of(model) != mesh:
        model = model.shard(mesh)
    return Reference(EasyDeLState.create(model), is_initial_policy)


def movable(reference: EasyDeLBaseModule, policy: EasyDeLBaseModule) -> EasyDeLBaseModule:
    """The reference with the arrays that `mix` will give it: adapters merged, no dtype narrower than the policy's.

    What it computes in, and the backend of its attention, stay its own.

    Raises:
      ValueError: it is no model of the policy's architecture.
    """
    merged, target = reference.merge_lora(), policy.without_lora()
    found, expected = (
        {"model_type": model.model_type} | {name: getattr(model.config, name) for name in model.config.compared_fields}
        for model in (merged, target)
    )
    if differ := [
        f"{name}={brief(found[name])} where model has {brief(expected[name])}"
        for name in expected
        if found[name] != expected[name]
    ]:
        raise ValueError(
            "sync_ref_model=True mixes the policy's weights into the reference, so both must be of one architecture; "
            f"reference_model has {', '.join(differ)}. Pass another, or set sync_ref_model=False."
        )
    arrays, structure = jax.tree.flatten(merged)
    dtypes = [jnp.promote_types(a.dtype, b.dtype) for a, b in zip(arrays, jax.tree.leaves(target), strict=True)]
    return jax.tree.unflatten(structure, [a if a.dtype == b else a.astype(b) for a, b in zip(arrays, dtypes)])


def mix(policy: EasyDeLBaseModule, reference: EasyDeLBaseModule, alpha: float) -> EasyDeLBaseModule:
    """Move the reference towards the policy: ``alpha * policy + (1 - alpha) * reference``, parameter by parameter.

    Adapters are mixed as what they add to the weights, since a mixture of adapters is no adapter of their rank. Arrays
    that both share stay shared. The reference keeps what it computes in.

    Args:
      policy: in training.
      reference: as `movable` gives it.
      alpha: the policy's share.

    References:
      Gorbatovski et al., Learn Your Reference Model for Real Good Alignment (TR-DPO), 2024, eq. 2.
    """
    new = jax.tree.leaves(policy.merge_lora())
    old, structure = jax.tree.flatten(reference)
    moved = [index for index, (a, b) in enumerate(zip(new, old, strict=True)) if a is not b]
    mixed = dict(zip(moved, _mix([new[index] for index in moved], [old[index] for index in moved], alpha)))
    return jax.tree.unflatten(structure, [mixed.get(index, leaf) for index, leaf in enumerate(old)])


def split_moving(reference: EasyDeLBaseModule, policy: EasyDeLBaseModule) -> tuple[PyTree, PyTree]:
    """Split a reference that follows the policy into the arrays that `mix` changes and those that stay shared.

    Each is the whole structure with None for the other's arrays; `join` undoes it.
    """
    adapted = {f"{path}.weight" for path in adapters(policy)}
    leaves, structure = jax.tree_util.tree_flatten_with_path(reference)
    moves = [
        ours is not shared or parameter_path(path) in adapted
        for (path, ours), shared in zip(leaves, jax.tree.leaves(policy.without_lora()), strict=True)
    ]
    return eqx.partition(reference, jax.tree.unflatten(structure, moves))


@jax.jit
def _mix(policy: list[Array], reference: list[Array], alpha: float) -> list[Array]:
    return [alpha * new + (1 - alpha) * old for new, old in zip(policy, reference)]

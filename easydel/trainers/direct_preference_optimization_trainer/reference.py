"""Where reference log-probs come from."""

from __future__ import annotations

import jax
from jax.sharding import Mesh
from jaxtyping import Array

from easydel.infra.base_module import EasyDeLBaseModule
from easydel.infra.base_state import EasyDeLState
from easydel.infra.lora import adapters, adapters_are_at_start
from easydel.infra.mesh import mesh_of
from easydel.infra.trainable import copy_trainable


def reference_state_for(
    policy: EasyDeLBaseModule,
    reference: EasyDeLBaseModule | EasyDeLState | None,
    mesh: Mesh,
    trained: EasyDeLBaseModule,
) -> tuple[EasyDeLState | None, bool]:
    """The frozen reference, and whether it is the policy's own start.

    None and the policy's own object both mean the policy as it was given. Its buffers are used as they are: the
    trainer updates a copy, so they stay what they were. Nothing is read from disk and no optimiser state is kept.
    Where only adapters are trained, the reference shares all else with the policy; where they are at their start,
    there is nothing to keep at all: the reference is the policy with adapters off.

    Args:
      policy: the model as it was given.
      reference: what was given as reference_model.
      mesh: the devices.
      trained: the trainer's own model, before the first update.

    Raises:
      ValueError: the reference has another vocabulary than the policy.
    """
    model = reference.model if isinstance(reference, EasyDeLState) else reference
    is_start = model is None or model is policy
    if is_start and trained.has_lora:
        if adapters_are_at_start(trained):
            return None, True
        # Dropout acts on the policy alone, so that even its first step may differ from the reference.
        has_dropout = any(adapter.dropout > 0 for adapter in adapters(trained).values())
        return EasyDeLState.create(copy_trainable(trained)), not has_dropout
    model = policy if model is None else model
    if model.config.vocab_size != policy.config.vocab_size:
        raise ValueError(
            f"reference_model has a vocabulary of {model.config.vocab_size} tokens, model has "
            f"{policy.config.vocab_size}; they must read the same token ids."
        )
    if mesh_of(model) != mesh:
        model = model.shard(mesh)
    return EasyDeLState.create(model), is_start


def mix(policy: EasyDeLBaseModule, reference: EasyDeLBaseModule, alpha: float) -> EasyDeLBaseModule:
    """A reference that follows the policy: ``alpha * policy + (1 - alpha) * reference``, parameter by parameter.

    Adapters are mixed as what they add to the weights, since a mixture of adapters is no adapter of their rank. Arrays
    that both share stay shared.

    References:
      Gorbatovski et al., Learn Your Reference Model for Real Good Alignment (TR-DPO), 2024, eq. 2.
    """
    new, structure = jax.tree.flatten(policy.merge_lora())
    old = jax.tree.leaves(reference.merge_lora())
    moved = [index for index, (a, b) in enumerate(zip(new, old)) if a is not b]
    mixed = _mix([new[index] for index in moved], [old[index] for index in moved], alpha)
    return jax.tree.unflatten(structure, [dict(zip(moved, mixed)).get(index, leaf) for index, leaf in enumerate(old)])


@jax.jit
def _mix(policy: list[Array], reference: list[Array], alpha: float) -> list[Array]:
    return [alpha * new + (1 - alpha) * old for new, old in zip(policy, reference)]

"""Where reference log-probs come from."""

from __future__ import annotations

import jax
from jax.sharding import Mesh

from easydel.infra.base_module import EasyDeLBaseModule
from easydel.infra.base_state import EasyDeLState
from easydel.infra.mesh import mesh_of


def reference_state_for(
    policy: EasyDeLBaseModule, reference: EasyDeLBaseModule | EasyDeLState | None, mesh: Mesh
) -> tuple[EasyDeLState, bool]:
    """The frozen reference, and whether it is the policy's own start.

    None and the policy's own object both mean the policy as it was given. Its buffers are used as they are: the
    trainer updates a copy, so they stay what they were. Nothing is read from disk and no optimiser state is kept.

    Raises:
      ValueError: the reference has another vocabulary than the policy.
    """
    model = reference.model if isinstance(reference, EasyDeLState) else reference
    is_start = model is None or model is policy
    model = policy if model is None else model
    if model.config.vocab_size != policy.config.vocab_size:
        raise ValueError(
            f"reference_model has a vocabulary of {model.config.vocab_size} tokens, model has "
            f"{policy.config.vocab_size}; they must read the same token ids."
        )
    if mesh_of(model) != mesh:
        model = model.shard(mesh)
    return EasyDeLState.create(model), is_start


@jax.jit
def mix(policy: EasyDeLBaseModule, reference: EasyDeLBaseModule, alpha: float) -> EasyDeLBaseModule:
    """A reference that follows the policy: ``alpha * policy + (1 - alpha) * reference``, parameter by parameter.

    References:
      Gorbatovski et al., Learn Your Reference Model for Real Good Alignment (TR-DPO), 2024, eq. 2.
    """
    return jax.tree.map(lambda new, old: alpha * new + (1 - alpha) * old, policy, reference)

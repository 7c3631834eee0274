"""Where the reference is."""

from __future__ import annotations

import logging
import shutil
import tempfile
import weakref
from pathlib import Path

import jax
from jax.sharding import Mesh

from easydel.infra.base_module import EasyDeLBaseModule
from easydel.infra.base_state import EasyDeLState
from easydel.infra.mesh import mesh_of
from easydel.infra.state_files import load_arrays, save_arrays

logger = logging.getLogger("easydel")


class Reference:
    """The model that a policy is held near: on the devices, or put aside on disk.

    Attributes:
      state: the frozen reference; None once it was put aside.
      is_start: whether it is the policy's own start.
    """

    def __init__(self, state: EasyDeLState, is_start: bool):
        self.state: EasyDeLState | None = state
        self.is_start = is_start
        self._folder: Path | None = None
        self._skeleton: EasyDeLBaseModule | None = None
        self._borrowed: EasyDeLBaseModule | None = None

    @property
    def is_put_aside(self) -> bool:
        """Whether the weights are on disk."""
        return self._folder is not None

    def model(self) -> EasyDeLBaseModule:
        """The weights to score with; those put aside stay in memory until `give_back`."""
        if self.state is not None:
            return self.state.model
        if self._borrowed is None:
            assert self._folder is not None and self._skeleton is not None  # without a state it was put aside
            self._borrowed = load_arrays(self._folder, self._skeleton)
        return self._borrowed

    def give_back(self) -> None:
        """Let go of weights that `model` read back from disk."""
        self._borrowed = None

    def put_aside(self) -> None:
        """Write the weights to a private temporary folder, which goes with this object, and let go of them."""
        if self.state is None:
            return
        parent = tempfile.mkdtemp(prefix="easydel-reference-")
        weakref.finalize(self, shutil.rmtree, parent, ignore_errors=True)
        self._folder = Path(parent) / "weights"
        save_arrays(self._folder, self.state.model)
        self._skeleton = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), self.state.model
        )
        arrays = [weakref.ref(leaf) for leaf in jax.tree.leaves(self.state.model)]
        self.state = None
        if held := sum(leaf.nbytes for array in arrays if (leaf := array()) is not None):
            logger.warning(
                "the trainer no longer needs the reference's weights, but your program still holds them (%d MB): "
                "remove your own variables for the model that was passed to the trainer.",
                held // 1_000_000,
            )


def reference_for(
    policy: EasyDeLBaseModule, reference: EasyDeLBaseModule | EasyDeLState | None, mesh: Mesh
) -> Reference:
    """The frozen reference of a policy.

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
    return Reference(EasyDeLState.create(model), is_start)


@jax.jit
def mix(policy: EasyDeLBaseModule, reference: EasyDeLBaseModule, alpha: float) -> EasyDeLBaseModule:
    """A reference that follows the policy: ``alpha * policy + (1 - alpha) * reference``, parameter by parameter.

    References:
      Gorbatovski et al., Learn Your Reference Model for Real Good Alignment (TR-DPO), 2024, eq. 2.
    """
    return jax.tree.map(lambda new, old: alpha * new + (1 - alpha) * old, policy, reference)

"""Hold a model in training: step counter, parameters and optimiser state."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from easydel.infra.language_model import LanguageModel
from easydel.infra.mesh import mesh_of, tree_shardings
from easydel.infra.state_files import load_arrays, save_arrays
from easydel.layers.lora import adapters, join, split_trainable
from easydel.layers.quantize import is_quantized

Model = TypeVar("Model", bound=LanguageModel)


class EasyDeLState(eqx.Module, Generic[Model]):
    """Step counter, model and optimiser state, as one pytree.

    Attributes:
      step: updates made so far.
      model: the parameters.
      opt_state: optimiser state of the trainable parameters (`easydel.layers.lora.split_trainable`), or None where
        nothing is trained.
      tx: the optimiser itself, static.
    """

    step: Int[Array, ""]
    model: Model
    opt_state: optax.OptState | None
    tx: optax.GradientTransformation | None = eqx.field(static=True)

    @classmethod
    def create(cls, model: Model, tx: optax.GradientTransformation | None = None) -> Self:
        """A state at step 0; the optimiser state takes the parameters' shardings.

        Raises:
          ValueError: there is an optimiser, but the weights are quantised and there are no adapters to train.
        """
        opt_state, mesh = None, mesh_of(model)
        if tx is not None:
            if is_quantized(model) and not adapters(model):
                raise ValueError(
                    "the model's weights are quantised to 8 bits, which no optimiser can train: train adapters beside "
                    "them (lora_rank, or model.apply_lora_to_layers), or start from the model before quantize()."
                )
            trainable, _ = split_trainable(model)
            # The paths of a parameter's moments end in that parameter's path, so the same rules fit.
            shardings = None
            if mesh is not None:
                shardings = tree_shardings(jax.eval_shape(tx.init, trainable), model.partition_rules, mesh)
            opt_state = jax.jit(tx.init, out_shardings=shardings)(trainable)
        return cls(step=jnp.int32(0), model=model, opt_state=opt_state, tx=tx)

    def apply_gradients(
        self, grads: PyTree, *, grad_norm: Float[Array, ""] | None = None, is_finite: Bool[Array, ""] | None = None
    ) -> Self:
        """The state after one optimiser update.

        Args:
          grads: gradients of the trainable parameters, in the structure of the first tree of `split_trainable`.
          grad_norm: their global norm where it is known; else an optimiser that clips computes it.
          is_finite: False changes nothing but the step counter; None always updates.

        Raises:
          ValueError: the state has no optimiser.
        """
        if self.tx is None:
            raise ValueError("this state has no optimiser; make it with EasyDeLState.create(model, tx).")
        update_of = optax.with_extra_args_support(self.tx).update
        trainable, frozen = split_trainable(self.model)

        def update(trainable: PyTree, opt_state: optax.OptState) -> tuple[PyTree, optax.OptState]:
            updates, opt_state = update_of(grads, opt_state, trainable, grad_norm=grad_norm)
            return optax.apply_updates(trainable, updates), opt_state

        if is_finite is None:
            trainable, opt_state = update(trainable, self.opt_state)
        else:
            # lax.cond, not jnp.where on every leaf: where would read and write the whole state again.
            trainable, opt_state = jax.lax.cond(is_finite, update, lambda *same: same, trainable, self.opt_state)
        return self.replace(step=self.step + 1, model=join(trainable, frozen), opt_state=opt_state)

    def replace(self, **fields: Any) -> Self:
        """A copy with other values in some fields.

        Raises:
          TypeError: there is no such field.
        """
        own: dict[str, Any] = {"step": self.step, "model": self.model, "opt_state": self.opt_state, "tx": self.tx}
        if unknown := fields.keys() - own.keys():
            raise TypeError(f"EasyDeLState has no {sorted(unknown)}; its fields are {list(own)}.")
        return type(self)(**(own | fields))

    @property
    def shardings(self) -> PyTree:
        """The sharding of every array, in the state's own structure."""
        return jax.tree.map(lambda leaf: leaf.sharding, self)

    def save_state(self, folder: str | Path) -> None:
        """Write step, model and optimiser state into a new folder; see `easydel.infra.state_files.save_arrays`."""
        save_arrays(folder, self)

    def load_state(self, folder: str | Path) -> Self:
        """The state saved in `folder`, laid out as this one; see `easydel.infra.state_files.load_arrays`.

        Raises:
          FileNotFoundError: there is no such folder.
          ValueError: it is damaged, or of another model or optimiser.

        Example:
          >>> state = EasyDeLState.create(model)
          >>> state.save_state("state")
          >>> int(state.load_state("state").step)
          0
        """
        return load_arrays(folder, self)

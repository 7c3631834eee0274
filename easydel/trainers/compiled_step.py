"""A training step, compiled so that it uses up what it trains and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jaxtyping import Array

from easydel.infra.base_state import EasyDeLState
from easydel.layers.lora import trainable_filter
from easydel.trainers.trainer_protocol import DeviceBatch, Metrics

TrainingStep = Callable[[EasyDeLState, DeviceBatch], tuple[EasyDeLState, Metrics]]


class CompiledTrainingStep:
    """`step` under `jax.jit`, its state donated but for frozen parameters.

    Frozen parameters are passed in, never out: the state that comes back holds the very arrays it was given, which
    the caller's own model may share.

    Args:
      step: the pure step.
      shardings: of the state, in its own structure; the new state gets them too.
    """

    def __init__(self, step: TrainingStep, shardings: EasyDeLState):
        self._structure = jax.tree.structure(shardings)
        self._is_trained = jax.tree.leaves(
            jax.tree.map(lambda _: True, shardings).replace(model=trainable_filter(shardings.model))
        )

        def step_of_parts(trained: list[Array], frozen: list[Array], batch: DeviceBatch) -> tuple[list[Array], Metrics]:
            state, metrics = step(self._whole(trained, frozen), batch)
            return self._split(state)[0], metrics

        self._compiled = jax.jit(step_of_parts, donate_argnums=0, out_shardings=(self._split(shardings)[0], None))

    def __call__(self, state: EasyDeLState, batch: DeviceBatch) -> tuple[EasyDeLState, Metrics]:
        trained, frozen = self._split(state)
        trained, metrics = self._compiled(trained, frozen, batch)
        return self._whole(trained, frozen), metrics

    def lower(self, state: EasyDeLState, batch: DeviceBatch) -> jax.stages.Lowered:
        """The program for such arguments, to look at its text or, compiled, at the memory it takes."""
        return self._compiled.lower(*self._split(state), batch)

    def _split(self, state: EasyDeLState) -> tuple[list[Array], list[Array]]:
        leaves = list(zip(jax.tree.leaves(state), self._is_trained, strict=True))
        return [leaf for leaf, trained in leaves if trained], [leaf for leaf, trained in leaves if not trained]

    def _whole(self, trained: list[Array], frozen: list[Array]) -> EasyDeLState:
        parts = {True: iter(trained), False: iter(frozen)}
        return jax.tree.unflatten(self._structure, [next(parts[kind]) for kind in self._is_trained])

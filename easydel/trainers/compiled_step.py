"""A training step, compiled so that it uses up what it trains and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jaxtyping import Array

from easydel.infra.base_state import EasyDeLState
from easydel.infra.trainable import trainable_filter
from easydel.trainers.trainer_protocol import DeviceBatch, Metrics

TrainingStep = Callable[[EasyDeLState, DeviceBatch], tuple[EasyDeLState, Metrics]]


def compile_training_step(step: TrainingStep, shardings: EasyDeLState) -> TrainingStep:
    """`step` under `jax.jit`, its state donated but for frozen parameters.

    Frozen parameters are passed in, never out: the state that comes back holds the very arrays it was given, which
    the caller's own model may share.

    Args:
      step: the pure step.
      shardings: of the state, in its own structure; the new state gets them too.
    """

    structure = jax.tree.structure(shardings)
    is_trained = jax.tree.leaves(
        jax.tree.map(lambda _: True, shardings).replace(model=trainable_filter(shardings.model))
    )

    def split(state: EasyDeLState) -> tuple[list[Array], list[Array]]:
        leaves = list(zip(jax.tree.leaves(state), is_trained, strict=True))
        return [leaf for leaf, trained in leaves if trained], [leaf for leaf, trained in leaves if not trained]

    def whole(trained: list[Array], frozen: list[Array]) -> EasyDeLState:
        parts = {True: iter(trained), False: iter(frozen)}
        return jax.tree.unflatten(structure, [next(parts[kind]) for kind in is_trained])

    def step_of_parts(trained, frozen, batch):
        state, metrics = step(whole(trained, frozen), batch)
        return split(state)[0], metrics

    compiled = jax.jit(step_of_parts, donate_argnums=0, out_shardings=(split(shardings)[0], None))

    def training_step(state: EasyDeLState, batch: DeviceBatch) -> tuple[EasyDeLState, Metrics]:
        trained, frozen = split(state)
        trained, metrics = compiled(trained, frozen, batch)
        return whole(trained, frozen), metrics

    return training_step

"""A training step, compiled so that it uses up what it trains and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import jax

from easydel.infra.base_module import EasyDeLBaseModule
from easydel.infra.base_state import EasyDeLState
from easydel.infra.trainable import join, split_trainable
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

    def split(state: EasyDeLState) -> tuple[EasyDeLState, EasyDeLBaseModule]:
        trainable, frozen = split_trainable(state.model)
        return state.replace(model=trainable), frozen

    def whole(trained: EasyDeLState, frozen: EasyDeLBaseModule) -> EasyDeLState:
        return trained.replace(model=join(trained.model, frozen))

    def step_of_parts(trained, frozen, batch):
        state, metrics = step(whole(trained, frozen), batch)
        return split(state)[0], metrics

    compiled = jax.jit(step_of_parts, donate_argnums=0, out_shardings=(split(shardings)[0], None))

    def training_step(state: EasyDeLState, batch: DeviceBatch) -> tuple[EasyDeLState, Metrics]:
        trained, frozen = split(state)
        trained, metrics = compiled(trained, frozen, batch)
        return whole(trained, frozen), metrics

    return training_step

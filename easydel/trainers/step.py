"""Make one update of any task: accumulate micro-batches, clip, skip a non-finite update, draw dropout keys.

A task gives a `TaskLoss`; `training_step` and `evaluation_step` are pure functions of a state and a batch, and
`CompiledTrainingStep` compiles the first so that it donates the state that it is given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree, Shaped

from easydel.infra.base_module import EasyDeLBaseModule
from easydel.infra.base_state import EasyDeLState
from easydel.infra.mesh import constrain
from easydel.layers.lora import join, split_trainable, trainable_filter, with_dropout
from easydel.ops.mesh_axes import DATA_AXES
from easydel.trainers.trainer_protocol import CountMicroBatches, DeviceBatch, Metrics, TaskLoss, TrainingStep

Scores = TypeVar("Scores", bound=PyTree)


def training_step(
    state: EasyDeLState,
    batch: DeviceBatch,
    *,
    loss: TaskLoss[Any],
    count_micro_batches: CountMicroBatches,
    remat: bool,
    dropout_seed: int = 0,
) -> tuple[EasyDeLState, Metrics]:
    """Make one optimiser update on one batch.

    The loss is the mean over the batch's examples for any number of micro-batches; gradients accumulate in float32, the
    dtype of the parameters. A non-finite loss or gradient leaves the state unchanged except for its step, which counts
    batches. Dropout of adapters is drawn from the seed, the state's step and the index of the micro-batch, so a run can
    be repeated from any of its states.

    Args:
      state: model, optimiser and step.
      batch: arrays ``[rows, ...]`` on the devices, with all that `loss` reads.
      loss: the task's loss.
      count_micro_batches: the number of micro-batches, from the shape ``(rows, length)`` of ``input_ids``.
      remat: rebuild each layer in the backward pass instead of keeping its activations.
      dropout_seed: seed of dropout.

    Returns:
      The new state, and the loss's metrics with ``grad_norm``, the global norm before clipping, and ``nonfinite``,
      whether the update was skipped.
    """
    totals = loss.totals(batch)
    trainable, frozen = split_trainable(state.model)
    dropout_key = jax.random.fold_in(jax.random.key(dropout_seed), state.step)
    micro_batches = split_micro_batches(batch, count_micro_batches(*batch["input_ids"].shape))
    # Accumulate into one gradient buffer: a second one would be as large as the parameters.
    gradient_refs = jax.tree.map(lambda leaf: jax.new_ref(jnp.zeros_like(leaf)), trainable)

    def loss_of(number: int | Array) -> Callable[[EasyDeLBaseModule], tuple[Array, Metrics]]:
        micro_batch = jax.tree.map(lambda rows: rows[number], micro_batches)

        def of_parameters(trainable: EasyDeLBaseModule) -> tuple[Array, Metrics]:
            model = with_dropout(join(trainable, frozen), jax.random.fold_in(dropout_key, number))
            metrics = loss(loss.score(model, micro_batch, remat=remat), micro_batch, totals)
            return metrics["loss"], metrics

        return of_parameters

    def add(number: Array, total: Metrics) -> Metrics:
        pull_back: Any  # annotated by JAX as a mere callable
        value, pull_back, metrics = jax.vjp(loss_of(number), trainable, has_aux=True)
        pull_back.with_refs(gradient_refs)(jnp.ones_like(value))
        return jax.tree.map(jnp.add, total, metrics)

    _, shapes = jax.eval_shape(loss_of(0), trainable)
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    metrics = jax.lax.fori_loop(0, micro_batches_in_use(micro_batches), add, nothing)
    gradient = jax.tree.map(jax.ref.freeze, gradient_refs)

    grad_norm = optax.global_norm(gradient)
    is_finite = jnp.isfinite(grad_norm) & jnp.isfinite(metrics["loss"])
    state = state.apply_gradients(gradient, grad_norm=grad_norm, is_finite=is_finite)
    return state, metrics | {"grad_norm": grad_norm, "nonfinite": ~is_finite}


def evaluation_step(
    state: EasyDeLState, batch: DeviceBatch, *, loss: TaskLoss[Any], count_micro_batches: CountMicroBatches
) -> Metrics:
    """Compute the metrics of one batch without gradients: score it in micro-batches, then reduce them together.

    Args:
      state: its model is evaluated.
      batch: arrays ``[rows, ...]`` on the devices, with all that `loss` reads.
      loss: the task's loss.
      count_micro_batches: the number of micro-batches, from the shape ``(rows, length)`` of ``input_ids``.

    Returns:
      The loss's metrics, each a mean over the batch's examples.
    """
    scores = map_micro_batches(
        lambda rows: loss.score(state.model, rows),
        {key: batch[key] for key in loss.scored_keys},
        count_micro_batches(*batch["input_ids"].shape),
    )
    return loss(scores, batch, loss.totals(batch))


def split_micro_batches(batch: DeviceBatch, count: int) -> DeviceBatch:
    """Cut ``[rows, ...]`` into ``[count, rows / count, ...]``; each takes every count-th row, so no row moves."""
    return {
        key: constrain(value.reshape(-1, count, *value.shape[1:]).swapaxes(0, 1), None, DATA_AXES)
        for key, value in batch.items()
    }


def join_micro_batches(value: Shaped[Array, "count rows *rest"]) -> Shaped[Array, "*joined"]:
    """Undo `split_micro_batches`."""
    return value.swapaxes(0, 1).reshape(-1, *value.shape[2:])


def micro_batches_in_use(micro_batches: DeviceBatch) -> Int[Array, ""]:
    """The number of micro-batches up to the last that holds a token; those after it need not be run."""
    holds_token = jnp.any(micro_batches["segment_ids"] > 0, axis=(1, 2))
    return jnp.max(jnp.where(holds_token, jnp.arange(1, holds_token.size + 1), 0))


def map_micro_batches(score: Callable[[DeviceBatch], Scores], batch: DeviceBatch, count: int) -> Scores:
    """Apply `score` to a batch without gradients, one micro-batch at a time.

    Args:
      score: from arrays ``[rows, ...]`` to arrays ``[rows, ...]``.
      batch: what `score` reads, including ``segment_ids``.
      count: number of micro-batches; those after the last that holds a token are not run and their rows are 0.

    Returns:
      What `score` returns for the whole batch, arrays ``[rows, ...]``.
    """
    if count == 1:
        return score(batch)
    micro_batches = split_micro_batches(batch, count)

    def score_of(number: int | Array) -> Scores:
        return score(jax.tree.map(lambda rows: rows[number], micro_batches))

    def put(number: Array, scored: Scores) -> Scores:
        return jax.tree.map(lambda whole, rows: whole.at[number].set(rows), scored, score_of(number))

    nothing = jax.tree.map(lambda rows: jnp.zeros((count, *rows.shape), rows.dtype), jax.eval_shape(score_of, 0))
    in_use = micro_batches_in_use(micro_batches)
    return jax.tree.map(join_micro_batches, jax.lax.fori_loop(0, in_use, put, nothing))


class CompiledTrainingStep:
    """A training step under `jax.jit` that donates its state, except for frozen parameters.

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

        def step_of_leaves(
            trained: list[Array], frozen: list[Array], batch: DeviceBatch
        ) -> tuple[list[Array], Metrics]:
            state, metrics = step(self._joined(trained, frozen), batch)
            return self._split(state)[0], metrics

        self._compiled = jax.jit(step_of_leaves, donate_argnums=0, out_shardings=(self._split(shardings)[0], None))

    def __call__(self, state: EasyDeLState, batch: DeviceBatch) -> tuple[EasyDeLState, Metrics]:
        trained, frozen = self._split(state)
        trained, metrics = self._compiled(trained, frozen, batch)
        return self._joined(trained, frozen), metrics

    def lower(self, state: EasyDeLState, batch: DeviceBatch) -> jax.stages.Lowered:
        """Lower the step for such arguments, to inspect its program or, once compiled, the memory it takes."""
        return self._compiled.lower(*self._split(state), batch)

    def _split(self, state: EasyDeLState) -> tuple[list[Array], list[Array]]:
        leaves = list(zip(jax.tree.leaves(state), self._is_trained, strict=True))
        return [leaf for leaf, trained in leaves if trained], [leaf for leaf, trained in leaves if not trained]

    def _joined(self, trained: list[Array], frozen: list[Array]) -> EasyDeLState:
        leaves = {True: iter(trained), False: iter(frozen)}
        return jax.tree.unflatten(self._structure, [next(leaves[is_trained]) for is_trained in self._is_trained])

"""Optimisers and learning-rate schedules, from optax."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import optax
from jaxtyping import PyTree

from easydel.infra.mesh import parameter_path

if TYPE_CHECKING:
    from easydel.trainers.training_arguments import TrainingArguments

# All with a decay that the learning rate scales; the rest of a signature is open to extra_optimizer_kwargs.
OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {"adamw": optax.adamw, "lion": optax.lion}
OWN_FIELDS = ("learning_rate", "weight_decay", "mask")


def make_schedule(arguments: TrainingArguments, total_steps: int) -> optax.Schedule:
    """Learning rate of update 0, 1, …: a linear warm-up, then constant, linear or cosine decay to 0.

    The warm-up's updates take 1/n, 2/n, … n/n of the peak: none of them is wasted on a rate of 0.
    """
    warmup = arguments.warmup_steps or round(arguments.warmup_ratio * total_steps)
    peak, decay_steps = arguments.learning_rate, max(1, total_steps - warmup)
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, decay_steps),
        "cosine": optax.cosine_decay_schedule(peak, decay_steps),
    }[arguments.scheduler]
    if warmup == 0:
        return after
    return optax.join_schedules([optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1)), after], [warmup])


def make_optimizer(arguments: TrainingArguments, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Clip the gradient's global norm, then one update of the chosen optimiser."""
    optimizer = OPTIMIZERS[arguments.optimizer](
        schedule, weight_decay=arguments.weight_decay, mask=decayed_parameters, **arguments.extra_optimizer_kwargs
    )
    if arguments.clip_grad is None:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(arguments.clip_grad), optimizer)


def decayed_parameters(params: PyTree) -> PyTree:
    """True for weight matrices and embeddings; norms and biases are not decayed."""

    def one(path, _leaf) -> bool:
        return not re.search(r"norm\.weight$|\.bias$", parameter_path(path))

    return jax.tree_util.tree_map_with_path(one, params)


def check_optimizer_kwargs(optimizer: str, kwargs: Mapping[str, Any]) -> None:
    """Refuse arguments that the optimiser does not take, or that have a field of their own."""
    accepted = [name for name in inspect.signature(OPTIMIZERS[optimizer]).parameters if name not in OWN_FIELDS]
    if unknown := [name for name in kwargs if name not in accepted]:
        raise ValueError(
            f"extra_optimizer_kwargs has {', '.join(unknown)}, which {optimizer} does not take here; "
            f"it takes {', '.join(accepted)}."
        )
    for name, value in kwargs.items():
        if isinstance(value, str):
            raise ValueError(f"extra_optimizer_kwargs has {name}={value!r}, expected a number, True or False.")

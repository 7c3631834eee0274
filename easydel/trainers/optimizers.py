"""Make optimisers and learning-rate schedules from optax, and check their arguments."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from easydel.infra.config_keys import Key
from easydel.infra.mesh import parameter_path
from easydel.option_types import LARGEST_FLOAT, LARGEST_INT, SMALLEST_FLOAT
from easydel.options import as_python


class OptimizerOptions(Protocol):
    """The options of a run that this module reads; `easydel.TrainingArguments` describes each."""

    @property
    def learning_rate(self) -> float: ...

    @property
    def scheduler(self) -> str: ...

    @property
    def warmup_steps(self) -> int: ...

    @property
    def warmup_ratio(self) -> float: ...

    @property
    def optimizer(self) -> str: ...

    @property
    def weight_decay(self) -> float: ...

    @property
    def clip_grad(self) -> float | None: ...

    @property
    def extra_optimizer_kwargs(self) -> dict[str, Any]: ...


def adafactor(
    learning_rate: optax.Schedule,
    weight_decay: float,
    mask: Callable[[PyTree], PyTree],
    min_dim_size_to_factor: int = 128,
    decay_rate: float = 0.8,
    clipping_threshold: float | None = 1.0,
    multiply_by_parameter_scale: bool = False,
    momentum: float | None = None,
    dtype_momentum: str = "float32",
    eps: float = 1e-30,
) -> optax.GradientTransformation:
    """`optax.adafactor` with learning rate and weight decay as AdamW has them.

    The second moment of a matrix is kept as its row and column means, per layer, so the state is almost nothing.
    Clipping and the scale of a parameter are computed over all layers of a stack together. The learning rate is
    absolute unless `multiply_by_parameter_scale`, and scales the decay too.

    References:
      Shazeer & Stern, Adafactor: Adaptive Learning Rates with Sublinear Memory Cost, 2018.
    """
    return optax.adafactor(
        learning_rate,
        min_dim_size_to_factor=min_dim_size_to_factor,
        decay_rate=decay_rate,
        multiply_by_parameter_scale=multiply_by_parameter_scale,
        clipping_threshold=clipping_threshold,
        momentum=momentum,
        dtype_momentum=dtype_momentum,
        weight_decay_rate=lambda count: weight_decay * learning_rate(count),
        weight_decay_mask=mask,
        eps=eps,
    )


# All scale the decay by the learning rate; extra_optimizer_kwargs may give every argument but OWN_FIELDS.
OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": optax.adamw,
    "lion": optax.lion,
    "adafactor": adafactor,
}
OWN_FIELDS = ("learning_rate", "weight_decay", "mask")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= LARGEST_FLOAT


SHARE = Key(expected="a number from 0 to below 1", accepts=lambda value: _is_number(value) and 0 <= value < 1)
# An eps too small for float32 becomes 0 and divides 0 by 0 where a gradient is 0.
ABOVE_ZERO = Key(
    expected="a number above 0 that float32 holds",
    accepts=lambda value: _is_number(value) and value >= SMALLEST_FLOAT,
)
TRUTH = Key(expected="True or False", accepts=lambda value: isinstance(value, bool))
# Only first moments may have 16 bits: a second moment changes by less than bfloat16 resolves.
MOMENT_DTYPE = Key(expected="'float32' or 'bfloat16'", accepts=lambda value: value in ("float32", "bfloat16"))


def _or_none(key: Key) -> Key:
    return Key(expected=f"None or {key.expected}", accepts=lambda value: value is None or key.accepts(value))


# Argument of an optimiser -> what it may be.
EXTRA_KWARGS: dict[str, Key] = {
    "b1": SHARE,
    "b2": SHARE,
    "eps": ABOVE_ZERO,
    "eps_root": Key(expected="a number of at least 0", accepts=lambda value: _is_number(value) and value >= 0),
    "nesterov": TRUTH,
    "mu_dtype": MOMENT_DTYPE,
    "min_dim_size_to_factor": Key(
        expected="a whole number of at least 1",
        accepts=lambda value: isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LARGEST_INT,
    ),
    "decay_rate": Key(
        expected="a number above 0 and below 1",
        accepts=lambda value: _is_number(value) and SMALLEST_FLOAT <= value < 1,
    ),
    "clipping_threshold": _or_none(ABOVE_ZERO),
    "multiply_by_parameter_scale": TRUTH,
    "momentum": _or_none(SHARE),
    "dtype_momentum": MOMENT_DTYPE,
}


def make_schedule(arguments: OptimizerOptions, total_steps: int) -> optax.Schedule:
    """Make the learning rate of update 0, 1, …: a linear warm-up, then constant, or linear or cosine decay to 0.

    The n updates of the warm-up take 1/n, 2/n, … n/n of the peak: none of them is wasted on a rate of 0.
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


def make_optimizer(arguments: OptimizerOptions, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Make the chosen optimiser, with clipping of the gradient's global norm before it."""
    optimizer = OPTIMIZERS[arguments.optimizer](
        schedule, weight_decay=arguments.weight_decay, mask=decayed_parameters, **arguments.extra_optimizer_kwargs
    )
    if arguments.clip_grad is None:
        return optimizer
    return optax.chain(clip_by_global_norm(arguments.clip_grad), optimizer)


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformationExtraArgs:
    """`optax.clip_by_global_norm` that takes the norm as ``grad_norm`` if the caller has computed it.

    .. math:: g \\min(1, c / \\lVert g \\rVert)

    Scaling costs no pass over the gradient of its own: the compiler fuses it with the optimiser's.
    """

    def update(
        gradient: PyTree,
        state: optax.EmptyState,
        _params: PyTree | None = None,
        *,
        grad_norm: Float[Array, ""] | None = None,
        **_: Any,
    ) -> tuple[PyTree, optax.EmptyState]:
        norm = optax.global_norm(gradient) if grad_norm is None else grad_norm
        factor = jnp.where(norm < max_norm, 1.0, max_norm / norm)
        return jax.tree.map(lambda leaf: (factor * leaf).astype(leaf.dtype), gradient), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def decayed_parameters(params: PyTree) -> PyTree:
    """Mark the parameters that decay: True for weight matrices and embeddings, False for norms and biases."""

    def one(path, _leaf) -> bool:
        return not re.search(r"norm\.weight$|\.bias$", parameter_path(path))

    return jax.tree_util.tree_map_with_path(one, params)


def check_optimizer_kwargs(optimizer: str, kwargs: Mapping[str, Any]) -> None:
    """Refuse arguments that the optimiser does not take, that have a field of their own, or that are out of range.

    Raises:
      ValueError: names all of them at once.
    """
    accepted = [name for name in inspect.signature(OPTIMIZERS[optimizer]).parameters if name not in OWN_FIELDS]
    if unknown := [name for name in kwargs if name not in accepted]:
        raise ValueError(
            f"extra_optimizer_kwargs has {', '.join(unknown)}, which {optimizer} does not take here; "
            f"it takes {', '.join(accepted)}."
        )
    bad = [
        f"{name}={as_python(value)}, expected {EXTRA_KWARGS[name].expected}"
        for name, value in kwargs.items()
        if not EXTRA_KWARGS[name].accepts(value)
    ]
    if bad:
        raise ValueError(f"extra_optimizer_kwargs has {'; '.join(bad)}.")
    if "dtype_momentum" in kwargs and kwargs.get("momentum") is None:
        raise ValueError(
            f"extra_optimizer_kwargs has dtype_momentum={kwargs['dtype_momentum']!r}, which has no effect without "
            "momentum; add momentum, for example 0.9, or leave it out."
        )

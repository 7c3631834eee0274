"""Add low-rank adapters to a model, remove them, merge them, and train them alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray, PyTree

from easydel.errors import listed
from easydel.infra.language_model import LanguageModel
from easydel.layers.linear import Linear, LoraAdapter, QuantizedWeight
from easydel.layers.surgery import Model, layer_linears, map_linears, matching_linears, placed

PyTreeT = TypeVar("PyTreeT", bound=PyTree)

LARGEST_ALPHA = float(jnp.finfo(jnp.float32).max)  # the adapters compute in float32


def adapters(model: LanguageModel) -> dict[str, LoraAdapter]:
    """The adapters of a model, by the path of their linear layer."""
    return {path: linear.lora for path, linear in layer_linears(model).items() if linear.lora is not None}


def require_no_adapters(model: LanguageModel) -> None:
    """Raise `ValueError` where a model has adapters: a layer carries one at most."""
    if adapters(model):
        raise ValueError("the model has adapters already; merge_lora() or without_lora() gives one without.")


def apply_lora(
    model: Model,
    rank: int,
    alpha: float | None = None,
    pattern: str | None = None,
    dropout: float = 0.0,
    use_rslora: bool = False,
    *,
    seed: int = 0,
) -> Model:
    """The same weights with fresh adapters beside them; outputs do not change.

    As in PEFT, the first factor is uniform between plus and minus ``1 / sqrt(in)`` and the second is zero. Adapters
    are float32 whatever the weights are kept in.

    Args:
      model: the result shares its arrays.
      rank: rows of the first factor.
      alpha: the adapters' output is scaled by ``alpha / rank``; None takes ``2 * rank``.
      pattern: regular expression for the paths of the layers to adapt, e.g. "q_proj|v_proj"; None takes every linear
        layer of the decoder layers. Embedding and head never have adapters.
      dropout: share of an adapter's input features that a training step drops.
      use_rslora: scale by ``alpha / sqrt(rank)`` (rsLoRA).
      seed: draws the first factor.

    Raises:
      ValueError: the model has adapters already, nothing matches `pattern`, or a number is out of range. A rank above
        a matrix's smaller side is out of range: it could not raise the rank of the product.
    """
    require_no_adapters(model)
    is_whole = isinstance(rank, int) and not isinstance(rank, bool)
    if not is_whole or rank < 1 or not 0 <= dropout < 1 or not (alpha is None or 0 < alpha <= LARGEST_ALPHA):
        raise ValueError(
            f"rank={rank}, alpha={alpha}, dropout={dropout}: "
            "expected at least 1, in whole numbers, None or a number above 0, and a share from 0 to below 1."
        )
    chosen = matching_linears(model, pattern)
    too_small = [
        f"{path} is {' x '.join(map(str, linear.weight.shape[-2:]))}"
        for path, linear in chosen.items()
        if rank > min(linear.weight.shape[-2:])
    ]
    if too_small:
        raise ValueError(
            f"lora_rank={rank} is more than the smaller side of what it is put on: {listed(too_small)}. Lower it, or "
            "leave these layers out with lora_pattern."
        )

    def fresh(key: PRNGKeyArray, linear: Linear) -> LoraAdapter:
        *stack, size_out, size_in = linear.weight.shape
        bound = 1 / math.sqrt(size_in)
        return LoraAdapter(
            a=jax.random.uniform(key, (*stack, rank, size_in), jnp.float32, -bound, bound),
            b=jnp.zeros((*stack, size_out, rank), jnp.float32),
            alpha=float(2 * rank if alpha is None else alpha),
            dropout=float(dropout),
            use_rslora=use_rslora,
        )

    keys = jax.random.split(jax.random.key(seed), len(chosen))
    return with_adapters(model, {path: fresh(key, chosen[path]) for key, path in zip(keys, chosen)})


def with_adapters(model: Model, new: Mapping[str, LoraAdapter]) -> Model:
    """The model with these adapters, by the path of their linear layer, laid out by the family's rule table."""

    def one(path: str, linear: Linear) -> Linear:
        if path not in new:
            return linear
        return dataclasses.replace(linear, lora=placed(new[path], f"{path}.lora", model))

    return map_linears(model, one)


def without_adapters(model: Model) -> Model:
    """The model with adapters off, sharing every other array."""
    return map_linears(model, lambda _, linear: dataclasses.replace(linear, lora=None) if linear.lora else linear)


def merge(model: Model) -> Model:
    """A plain model with the adapters added into the weights, in float32; untouched arrays are the same objects.

    Quantised weights, with or without an adapter, come back in the dtype they were made from.
    """

    def one(path: str, linear: Linear) -> Linear:
        weight = linear.weight
        if linear.lora is None and not isinstance(weight, QuantizedWeight):
            return linear
        merged = weight.dequantize() if isinstance(weight, QuantizedWeight) else weight.astype(jnp.float32)
        if linear.lora is not None:
            merged = merged + linear.lora.delta
        merged = placed(merged.astype(weight.dtype), f"{path}.weight", model)
        return dataclasses.replace(linear, weight=merged, lora=None)

    return map_linears(model, one)


def with_dropout(model: Model, key: PRNGKeyArray) -> Model:
    """The model for one training step: adapters drop input features, drawn anew for each layer, expert and module.

    Adapters with a dropout of 0 stay as they are.
    """
    paths = list(adapters(model))

    def one(path: str, linear: Linear) -> Linear:
        if linear.lora is None or linear.lora.dropout == 0:
            return linear
        keys = jax.random.split(jax.random.fold_in(key, paths.index(path)), linear.weight.shape[:-2])
        return dataclasses.replace(linear, lora=dataclasses.replace(linear.lora, dropout_key=keys))

    return map_linears(model, one)


def adapters_are_at_start(model: LanguageModel) -> bool:
    """Whether every adapter changes nothing yet: its second factor is zero."""
    return not any(jax.device_get([jnp.any(adapter.b != 0) for adapter in adapters(model).values()]))


def trainable_filter(model: PyTree) -> PyTree[bool]:
    """True or False for every array of a model, in the model's own structure."""

    def is_adapter(node: PyTree) -> bool:
        return isinstance(node, LoraAdapter)

    if not any(map(is_adapter, jax.tree.leaves(model, is_leaf=is_adapter))):
        return jax.tree.map(lambda _: True, model)
    return jax.tree.map(lambda node: jax.tree.map(lambda _: is_adapter(node), node), model, is_leaf=is_adapter)


def split_trainable(model: PyTreeT) -> tuple[PyTreeT, PyTreeT]:
    """``(trainable, frozen)``: the model twice, with None for the arrays that the other one has; `join` undoes it."""
    return eqx.partition(model, trainable_filter(model))


def join(trainable: PyTreeT, frozen: PyTreeT) -> PyTreeT:
    """The whole model from the two trees of `split_trainable`."""
    return eqx.combine(trainable, frozen)


def copy_trainable(model: PyTreeT) -> PyTreeT:
    """The model with trainable arrays of its own; the frozen ones are shared."""
    trainable, frozen = split_trainable(model)
    return join(jax.tree.map(lambda array: array.copy(), trainable), frozen)

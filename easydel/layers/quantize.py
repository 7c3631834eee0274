"""Keep the weights of a model's layers in 8 bits."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array

from easydel.infra.language_model import LanguageModel
from easydel.layers.linear import Linear, QuantizedWeight
from easydel.layers.surgery import Model, layer_linears, map_linears, matching_linears, placed


def quantize(model: Model, pattern: str | None = None) -> Model:
    """The model with the weights of its layers in 8 bits, a quarter of float32's memory; other arrays are shared.

    Such weights are not trained: put adapters beside them. Norms, biases, embedding and head stay as they are.

    Args:
      model: a model without quantised weights; adapters are kept.
      pattern: regular expression for the paths of the layers to quantise; None takes every linear layer.

    Raises:
      ValueError: some weights are quantised already, nothing matches `pattern`, or a weight holds NaN or infinity, for
        which there is no scale.
    """
    if is_quantized(model):
        raise ValueError("the model has quantised weights already; merge_lora() gives one without.")
    chosen = matching_linears(model, pattern)
    are_finite = jax.device_get({path: _is_finite(linear) for path, linear in chosen.items()})
    damaged = [path for path, is_finite in are_finite.items() if not is_finite]
    if damaged:
        raise ValueError(f"weights with numbers that are not finite cannot be quantised: {', '.join(damaged)}.")

    def one(path: str, linear: Linear) -> Linear:
        if path not in chosen:
            return linear
        weight = placed(jax.jit(QuantizedWeight.of)(linear.weight), f"{path}.weight", model)
        return dataclasses.replace(linear, weight=weight)

    return map_linears(model, one)


def _is_finite(linear: Linear) -> Array:
    assert not isinstance(linear.weight, QuantizedWeight)
    return jnp.isfinite(linear.weight).all()


def is_quantized(model: LanguageModel) -> bool:
    """Whether any layer's weight is kept in 8 bits."""
    return any(isinstance(linear.weight, QuantizedWeight) for linear in layer_linears(model).values())

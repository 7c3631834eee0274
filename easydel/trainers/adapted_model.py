"""Take the model out of a state, and add the adapters that the options ask for."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from easydel.infra.base_module import EasyDeLBaseModule
from easydel.infra.base_state import EasyDeLState
from easydel.layers.lora import split_trainable
from easydel.trainers.training_arguments import TrainingArguments
from easydel.weights.pretrained import TRAINABLE_TYPES


def model_of(model: EasyDeLBaseModule | EasyDeLState, name: str = "model") -> EasyDeLBaseModule:
    """Return the model itself, or the model of a state.

    Args:
      model: a model or a state.
      name: what an error calls it.

    Raises:
      TypeError: it is neither.
    """
    if not isinstance(model, (EasyDeLBaseModule, EasyDeLState)):
        raise TypeError(
            f"{name} is {type(model).__name__} {model!r:.80}, expected a model or a state; load one with "
            "AutoEasyDeLModelForCausalLM.from_pretrained."
        )
    return model.model if isinstance(model, EasyDeLState) else model


def adapted_model(model: EasyDeLBaseModule, arguments: TrainingArguments) -> EasyDeLBaseModule:
    """Return the model with the adapters and the quantised weights that the options ask for.

    Raises:
      ValueError: the model has adapters or quantised weights already, or number types that are not trained in.
    """
    adapted = _adapted(model, arguments)
    _require_trainable_types(adapted)
    return adapted


def _adapted(model: EasyDeLBaseModule, arguments: TrainingArguments) -> EasyDeLBaseModule:
    if arguments.lora_rank is None:
        return model
    if arguments.quantize_base is not None:
        if model.is_quantized:
            raise ValueError(
                f"quantize_base={arguments.quantize_base!r}, but the model is quantised already; leave it out."
            )
        model = model.quantize()
    if model.has_lora:
        raise ValueError(
            f"lora_rank={arguments.lora_rank}, but the model has adapters already: leave lora_rank out to train "
            "those, or pass model.merge_lora() to train new ones on top of them."
        )
    return model.apply_lora_to_layers(
        arguments.lora_rank,
        arguments.lora_alpha,
        arguments.lora_pattern,
        dropout=arguments.lora_dropout,
        use_rslora=arguments.use_rslora,
        seed=arguments.lora_seed,
    )


def _require_trainable_types(model: EasyDeLBaseModule) -> None:
    if str(model.dtype) not in TRAINABLE_TYPES:
        raise ValueError(
            f"the model computes in {model.dtype}, which is not trained in: load it with dtype=bfloat16 or float32. "
            "(float16 loses gradients that are small or large; it is for inference.)"
        )
    leaves = jax.tree.leaves(split_trainable(model)[0])
    kept = {str(leaf.dtype) for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)} - set(TRAINABLE_TYPES)
    if kept:
        raise ValueError(
            f"the model keeps parameters in {', '.join(sorted(kept))}, which are not trained: load it with "
            "param_dtype=float32."
        )

"""The model as the options want it trained."""

from __future__ import annotations

from easydel.infra.base_module import EasyDeLBaseModule
from easydel.trainers.training_arguments import TrainingArguments


def with_adapters(model: EasyDeLBaseModule, arguments: TrainingArguments) -> EasyDeLBaseModule:
    """The model with the adapters, and the quantised weights beside them, that the options ask for."""
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

"""Qwen2 and Qwen2.5: biases on queries, keys and values; upper layers may slide."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from easydel.infra.base_config import EasyDeLBaseConfig, HuggingFaceConfig
from easydel.modules.decoder import DecoderForCausalLM


def sliding_layers(config: HuggingFaceConfig) -> tuple[int | None, ...]:
    """One window a layer, from ``layer_types`` or, in older files, from ``max_window_layers``."""
    layers = config.require("num_hidden_layers")
    window = config.get("sliding_window", None) if config.get("use_sliding_window", False) else None
    first = config.get("max_window_layers", layers)
    default = ["sliding_attention" if window and layer >= first else "full_attention" for layer in range(layers)]
    types = config.get("layer_types", default)
    if len(types) != layers or not set(types) <= {"sliding_attention", "full_attention"}:
        raise ValueError(
            f"config.json has layer_types={types}; expected sliding_attention or full_attention, {layers} times."
        )
    return tuple(window if kind == "sliding_attention" else None for kind in types)


class Qwen2ForCausalLM(DecoderForCausalLM):
    """Qwen2 (Yang et al. 2024)."""

    model_type = "qwen2"

    @classmethod
    def read_config(cls, raw: Mapping[str, Any]) -> EasyDeLBaseConfig:
        config = HuggingFaceConfig(raw)
        return config.decoder(qkv_bias=True, layer_windows=sliding_layers(config))

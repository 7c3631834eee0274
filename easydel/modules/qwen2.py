"""Define Qwen2 and Qwen2.5: biases on queries, keys and values; upper layers may have sliding windows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from easydel.infra.base_config import (
    FULL,
    SLIDING,
    EasyDeLBaseConfig,
    decoder_config,
    layer_types_key,
    read_decoder_keys,
    sliding_windows,
    window_key,
)
from easydel.infra.config_keys import LARGEST_INDEX, only, switch, whole
from easydel.modules.decoder import DecoderForCausalLM

SLIDING_KEYS = {
    "max_position_embeddings": whole(1, LARGEST_INDEX, default=32768),
    "use_sliding_window": switch(False),
    "sliding_window": window_key(),
    "max_window_layers": whole(0, LARGEST_INDEX, default=28),
    "layer_types": layer_types_key(),
}
KEYS = SLIDING_KEYS | {
    # Not read by transformers, written by other exports: the tensors say whether there are biases.
    "attention_bias": switch(True),
    "use_mrope": only(False),
}


def read_sliding_windows(values: Mapping[str, Any]) -> tuple[int | None, ...]:
    """One window per layer, from ``layer_types`` or, in older files, from ``max_window_layers``."""
    layers = values["num_hidden_layers"]
    window = values["sliding_window"] if values["use_sliding_window"] else None
    first = layers if window is None else values["max_window_layers"]
    default = [SLIDING if layer >= first else FULL for layer in range(layers)]
    return sliding_windows(values["layer_types"], default, window)


def sliding_keys(config: EasyDeLBaseConfig) -> dict[str, Any]:
    """The keys that `read_sliding_windows` reads."""
    window = next((window for window in config.layer_windows if window is not None), None)
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": config.num_hidden_layers,
        "layer_types": [FULL if window is None else SLIDING for window in config.layer_windows],
    }


class Qwen2ForCausalLM(DecoderForCausalLM):
    """Qwen2 (Yang et al. 2024)."""

    model_type = "qwen2"

    @classmethod
    def read_config(cls, raw: Mapping[str, Any]) -> EasyDeLBaseConfig:
        values = read_decoder_keys(raw, KEYS)
        return decoder_config(EasyDeLBaseConfig, raw, values, qkv_bias=True, layer_windows=read_sliding_windows(values))

    @classmethod
    def family_keys(cls, config: EasyDeLBaseConfig) -> dict[str, Any]:
        return sliding_keys(config)

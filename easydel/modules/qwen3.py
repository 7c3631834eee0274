"""Qwen3: normalised queries and keys, a head size of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from easydel.infra.base_config import EasyDeLBaseConfig, HuggingFaceConfig
from easydel.modules.decoder import DecoderForCausalLM
from easydel.modules.qwen2 import sliding_layers


class Qwen3ForCausalLM(DecoderForCausalLM):
    """Qwen3 (Yang et al. 2025)."""

    model_type = "qwen3"

    @classmethod
    def read_config(cls, raw: Mapping[str, Any]) -> EasyDeLBaseConfig:
        config = HuggingFaceConfig(raw)
        bias = config.get("attention_bias", False)
        return config.decoder(
            head_dim=config.get("head_dim", 128),
            qk_norm=True,
            qkv_bias=bias,
            attention_output_bias=bias,
            layer_windows=sliding_layers(config),
        )

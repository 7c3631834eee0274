"""Llama 1 to 3.x, SmolLM2 and everything else with ``model_type: llama``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from easydel.infra.base_config import EasyDeLBaseConfig, HuggingFaceConfig
from easydel.modules.decoder import DecoderForCausalLM


class LlamaForCausalLM(DecoderForCausalLM):
    """Llama (Touvron et al. 2023; Llama 3 Herd of Models, 2024)."""

    model_type = "llama"

    @classmethod
    def read_config(cls, raw: Mapping[str, Any]) -> EasyDeLBaseConfig:
        config = HuggingFaceConfig(raw)
        bias = config.get("attention_bias", False)
        return config.decoder(qkv_bias=bias, attention_output_bias=bias, mlp_bias=config.get("mlp_bias", False))

"""Mistral: every layer looks back over a sliding window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from easydel.infra.base_config import EasyDeLBaseConfig, HuggingFaceConfig
from easydel.modules.decoder import DecoderForCausalLM


class MistralForCausalLM(DecoderForCausalLM):
    """Mistral (Jiang et al. 2023)."""

    model_type = "mistral"

    @classmethod
    def read_config(cls, raw: Mapping[str, Any]) -> EasyDeLBaseConfig:
        config = HuggingFaceConfig(raw)
        window = config.get("sliding_window", None)
        return config.decoder(layer_windows=(window,) * config.require("num_hidden_layers"))

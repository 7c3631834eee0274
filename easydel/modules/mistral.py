"""Mistral: every layer looks back over a sliding window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from easydel.infra.base_config import EasyDeLBaseConfig, HuggingFaceConfig
from easydel.modules.decoder import DecoderForCausalLM

DEFAULT_WINDOW = 4096


class MistralForCausalLM(DecoderForCausalLM):
    """Mistral (Jiang et al. 2023)."""

    model_type = "mistral"

    @classmethod
    def read_config(cls, raw: Mapping[str, Any]) -> EasyDeLBaseConfig:
        config = HuggingFaceConfig(raw)
        window = config.raw.get("sliding_window", DEFAULT_WINDOW)  # null means none, absent means the default
        return config.decoder(layer_windows=(window,) * config.require("num_hidden_layers"))

"""Define Llama 1 to 3.x, SmolLM2 and every other model with ``model_type: llama``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from easydel.infra.base_config import EasyDeLBaseConfig, decoder_config, read_decoder_keys
from easydel.infra.config_keys import only, switch
from easydel.modules.decoder import DecoderForCausalLM

KEYS = {
    "attention_bias": switch(False),
    "mlp_bias": switch(False),
    "rope_interleaved": only(False),  # SmolLM2
}


class LlamaForCausalLM(DecoderForCausalLM):
    """Llama (Touvron et al. 2023; Llama 3 Herd of Models, 2024)."""

    model_type = "llama"

    @classmethod
    def read_config(cls, raw: Mapping[str, Any]) -> EasyDeLBaseConfig:
        values = read_decoder_keys(raw, KEYS)
        bias = values["attention_bias"]
        return decoder_config(
            EasyDeLBaseConfig, raw, values, qkv_bias=bias, attention_output_bias=bias, mlp_bias=values["mlp_bias"]
        )

    @classmethod
    def family_keys(cls, config: EasyDeLBaseConfig) -> dict[str, Any]:
        return {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}

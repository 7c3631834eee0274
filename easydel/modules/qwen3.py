"""Define Qwen3: norms of queries and keys, and a head size that the config sets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from easydel.infra.base_config import EasyDeLBaseConfig, decoder_config, read_decoder_keys
from easydel.infra.config_keys import switch, whole
from easydel.modules.decoder import DecoderForCausalLM
from easydel.modules.qwen2 import SLIDING_KEYS, read_sliding_windows, sliding_keys

KEYS = SLIDING_KEYS | {
    "head_dim": whole(2, 2**16, default=128),
    "attention_bias": switch(False),
}


class Qwen3ForCausalLM(DecoderForCausalLM):
    """Qwen3 (Yang et al. 2025)."""

    model_type = "qwen3"

    @classmethod
    def read_config(cls, raw: Mapping[str, Any]) -> EasyDeLBaseConfig:
        values = read_decoder_keys(raw, KEYS)
        bias = values["attention_bias"]
        return decoder_config(
            EasyDeLBaseConfig,
            raw,
            values,
            qk_norm=True,
            qkv_bias=bias,
            attention_output_bias=bias,
            layer_windows=read_sliding_windows(values),
        )

    @classmethod
    def family_keys(cls, config: EasyDeLBaseConfig) -> dict[str, Any]:
        return {"attention_bias": config.qkv_bias} | sliding_keys(config)

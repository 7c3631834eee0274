"""Define Mistral: every layer has the same sliding window, or none."""

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
    window_key,
)
from easydel.infra.config_keys import whole
from easydel.modules.decoder import DecoderForCausalLM

KEYS = {
    "num_key_value_heads": whole(1, 2**16, default=8, null=None),
    "max_position_embeddings": whole(1, 2**31 - 1, default=131072),
    "sliding_window": window_key(),
    "layer_types": layer_types_key(),
}


class MistralForCausalLM(DecoderForCausalLM):
    """Mistral (Jiang et al. 2023)."""

    model_type = "mistral"

    @classmethod
    def read_config(cls, raw: Mapping[str, Any]) -> EasyDeLBaseConfig:
        values = read_decoder_keys(raw, KEYS)
        window, layers = values["sliding_window"], values["num_hidden_layers"]
        kind = FULL if window is None else SLIDING
        if set(values["layer_types"] or [kind]) != {kind}:  # transformers does not read them for this family
            raise ValueError(
                f'config.json of model_type "mistral" has "layer_types" other than "{kind}", which is what '
                f'"sliding_window": {"null" if window is None else window} says of every layer.'
            )
        return decoder_config(EasyDeLBaseConfig, raw, values, layer_windows=(window,) * layers)

    @classmethod
    def family_keys(cls, config: EasyDeLBaseConfig) -> dict[str, Any]:
        return {"sliding_window": config.layer_windows[0]}

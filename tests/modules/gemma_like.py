"""A family like Gemma, as one would add it: its keys, its config, its layers' parts, its tensors' names."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import PRNGKeyArray

from easydel.infra.base_config import EasyDeLBaseConfig, decoder_config, read_decoder_keys, window_key
from easydel.infra.config_keys import number, only, switch, whole
from easydel.infra.rotary_config import RotaryTable
from easydel.layers.attention import SelfAttention
from easydel.layers.decoder_layer import DecoderLayer, SandwichNormLayer
from easydel.layers.mlp import GatedMLP
from easydel.layers.norm import RMSNorm
from easydel.modules.decoder import DecoderForCausalLM
from easydel.weights.weight_map import LAYER, TensorRule, WeightMap, linear

OWN_KEYS = {
    "query_pre_attn_scalar": number(1, 1e6, default=256),
    "rope_local_base_freq": number(1, 1e15, default=1e4),
    "attn_logit_softcapping": number(1e-3, 1e6, default=None, null=None),
    "final_logit_softcapping": number(1e-3, 1e6, default=None, null=None),
    "sliding_window_pattern": whole(1, 1000, default=6),
    "sliding_window": window_key(),
}
KEYS = OWN_KEYS | {"hidden_act": only("gelu_pytorch_tanh"), "tie_word_embeddings": switch(True)}
NORMS = {
    "input_layernorm": "norm_before_mixing",
    "post_attention_layernorm": "norm_after_mixing",
    "pre_feedforward_layernorm": "norm_before_mlp",
    "post_feedforward_layernorm": "norm_after_mlp",
    "self_attn.q_norm": "mixing.q_norm",
    "self_attn.k_norm": "mixing.k_norm",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GemmaLikeConfig(EasyDeLBaseConfig):
    query_pre_attn_scalar: float
    rope_local_base_freq: float
    attn_logit_softcapping: float | None
    final_logit_softcapping: float | None
    sliding_window_pattern: int
    sliding_window: int | None

    @property
    def rotary_tables(self) -> tuple[RotaryTable, ...]:
        return RotaryTable(self.rope_theta, self.rope_scaling), RotaryTable(self.rope_local_base_freq)

    @property
    def layer_rotary(self) -> tuple[int, ...]:
        return tuple(0 if window is None else 1 for window in self.layer_windows)

    @property
    def attention_scale(self) -> float:
        return self.query_pre_attn_scalar**-0.5

    @property
    def attention_soft_cap(self) -> float | None:
        return self.attn_logit_softcapping

    @property
    def embedding_scale(self) -> float:
        return math.sqrt(self.hidden_size)

    @property
    def logit_soft_cap(self) -> float | None:
        return self.final_logit_softcapping


class GemmaLikeForCausalLM(DecoderForCausalLM):
    """Sandwich norms with ``1 + weight``, QK norm, GELU, local layers with windows and a rotary table of their own."""

    model_type = "gemma_like"
    layer_prefix = "decoder.blocks."
    layer_rules = (
        *(TensorRule(f"{theirs}.weight", (f"{ours}.weight",)) for ours, theirs in NORMS.items()),
        *(rule for name in "qkvo" for rule in linear(f"mixing.{name}", f"self_attn.{name}_proj")),
        *(rule for name in ("gate", "up", "down") for rule in linear(f"mlp.{name}", f"mlp.{name}_proj")),
    )

    @classmethod
    def weight_map_for(cls, config: GemmaLikeConfig) -> WeightMap:
        (layers,) = config.layer_stacks.values()
        return WeightMap(
            (
                TensorRule("decoder.tokens.weight", ("embed_tokens.weight",)),
                *(rule.under("layers", f"{cls.layer_prefix}{LAYER}", layers) for rule in cls.layer_rules),
                TensorRule("decoder.last_norm.weight", ("norm.weight",)),
                TensorRule("decoder.head.weight", ("lm_head.weight",)),
            )
        )

    @classmethod
    def read_config(cls, raw: Mapping[str, Any]) -> GemmaLikeConfig:
        values = read_decoder_keys(raw, KEYS)
        window, pattern = values["sliding_window"], values["sliding_window_pattern"]
        windows = tuple(window if (layer + 1) % pattern else None for layer in range(values["num_hidden_layers"]))
        own = {name: values[name] for name in OWN_KEYS}
        return decoder_config(GemmaLikeConfig, raw, values, layer_windows=windows, qk_norm=True, **own)

    @classmethod
    def family_keys(cls, config: GemmaLikeConfig) -> dict[str, Any]:
        return {name: getattr(config, name) for name in OWN_KEYS} | {"hidden_act": "gelu_pytorch_tanh"}

    @classmethod
    def init_norm(cls, config: GemmaLikeConfig) -> RMSNorm:
        return RMSNorm.init(config.hidden_size, config.rms_norm_eps, offset=1.0)

    @classmethod
    def init_layer(cls, key: PRNGKeyArray, config: GemmaLikeConfig, kind: str) -> DecoderLayer:
        attention, mlp = jax.random.split(key)
        norm = functools.partial(RMSNorm.init, eps=config.rms_norm_eps, offset=1.0)
        hidden, std = config.hidden_size, config.initializer_range
        heads = config.num_attention_heads, config.num_key_value_heads
        return SandwichNormLayer(
            input_layernorm=norm(hidden),
            self_attn=SelfAttention.init(attention, hidden, *heads, config.head_dim, std, norm=norm),
            post_attention_layernorm=norm(hidden),
            pre_feedforward_layernorm=norm(hidden),
            mlp=GatedMLP.init(mlp, hidden, config.intermediate_size, std, activation="gelu_pytorch_tanh"),
            post_feedforward_layernorm=norm(hidden),
        )

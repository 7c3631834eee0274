"""The decoder every family shares: embedding, stacked layers under one scan, final norm, head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, PRNGKeyArray

from easydel.infra.base_config import EasyDeLBaseConfig
from easydel.infra.base_module import EasyDeLBaseModule
from easydel.infra.language_model import KeyValueCache
from easydel.infra.mesh import PartitionRules, constrain
from easydel.layers.linear import Linear, QuantizedWeight
from easydel.layers.rotary import rotary_angles, rotary_frequencies, rotate
from easydel.ops.attention.inputs import AttentionOptions, TokenIds
from easydel.ops.attention.residuals import keep_attention
from easydel.ops.attention.tree_attention import tree_attention
from easydel.ops.mesh_axes import DATA_AXES
from easydel.weights.weight_map import LAYER, TensorRule, WeightMap, linear

T = TypeVar("T")
# To write and read an element of an activation costs as much as to compute it anew, unless it comes from a product.
KEEP_PRODUCTS = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable, keep_attention
)
# How the tensors of one layer are named in its files.
LAYER_RULES = (
    TensorRule("input_layernorm.weight"),
    TensorRule("post_attention_layernorm.weight"),
    *(rule for name in "qkvo" for rule in linear(f"self_attn.{name}_proj")),
    TensorRule("self_attn.q_norm.weight"),
    TensorRule("self_attn.k_norm.weight"),
    *(rule for name in ("gate", "up", "down") for rule in linear(f"mlp.{name}_proj")),
)
# (queries, keys, values), each [tokens, heads, head_dim] -> attended values and whatever the caller wants back.
Attend = Callable[[Array, Array, Array], tuple[Array, T]]


class Embedding(eqx.Module):
    """One vector a token id."""

    weight: Float[Array, "vocab hidden"]


class RMSNorm(eqx.Module):
    """Scale to unit root mean square, in float32 (Zhang & Sennrich 2019)."""

    weight: Float[Array, " size"]
    eps: float = eqx.field(static=True)

    def __call__(self, x: Float[Array, "*batch size"]) -> Float[Array, "*batch size"]:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return (self.weight * normed).astype(x.dtype)


class SelfAttention(eqx.Module):
    """Projections around an attention that the caller chooses."""

    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    o_proj: Linear
    q_norm: RMSNorm | None
    k_norm: RMSNorm | None
    head_dim: int = eqx.field(static=True)

    @classmethod
    def init(cls, key: PRNGKeyArray, config: EasyDeLBaseConfig) -> SelfAttention:
        keys = jax.random.split(key, 4)
        hidden, std = config.hidden_size, config.initializer_range
        queries = config.num_attention_heads * config.head_dim
        keys_values = config.num_key_value_heads * config.head_dim

        def head_norm():
            return RMSNorm(jnp.ones(config.head_dim), config.rms_norm_eps) if config.qk_norm else None

        return cls(
            q_proj=Linear.init(keys[0], hidden, queries, std, config.qkv_bias),
            k_proj=Linear.init(keys[1], hidden, keys_values, std, config.qkv_bias),
            v_proj=Linear.init(keys[2], hidden, keys_values, std, config.qkv_bias),
            o_proj=Linear.init(keys[3], queries, hidden, std, config.attention_output_bias),
            q_norm=head_norm(),
            k_norm=head_norm(),
            head_dim=config.head_dim,
        )

    def __call__(self, x: Array, cos: Array, sin: Array, attend: Attend[T]) -> tuple[Array, T]:
        q, k, v = (
            project(x).reshape(x.shape[0], -1, self.head_dim) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        attended, extra = attend(rotate(q, cos, sin), rotate(k, cos, sin), v)
        return self.o_proj(attended.reshape(x.shape[0], -1)), extra


class GatedMLP(eqx.Module):
    """SwiGLU (Shazeer 2020)."""

    gate_proj: Linear
    up_proj: Linear
    down_proj: Linear

    @classmethod
    def init(cls, key: PRNGKeyArray, config: EasyDeLBaseConfig) -> GatedMLP:
        gate, up, down = jax.random.split(key, 3)
        sizes = config.hidden_size, config.intermediate_size
        return cls(
            gate_proj=Linear.init(gate, *sizes, config.initializer_range, config.mlp_bias),
            up_proj=Linear.init(up, *sizes, config.initializer_range, config.mlp_bias),
            down_proj=Linear.init(down, *sizes[::-1], config.initializer_range, config.mlp_bias),
        )

    def __call__(self, x: Array) -> Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(eqx.Module):
    """Pre-norm attention and MLP with residual connections."""

    input_layernorm: RMSNorm
    self_attn: SelfAttention
    post_attention_layernorm: RMSNorm
    mlp: GatedMLP

    @classmethod
    def init(cls, key: PRNGKeyArray, config: EasyDeLBaseConfig) -> DecoderLayer:
        attention, mlp = jax.random.split(key)
        return cls(
            input_layernorm=RMSNorm(jnp.ones(config.hidden_size), config.rms_norm_eps),
            self_attn=SelfAttention.init(attention, config),
            post_attention_layernorm=RMSNorm(jnp.ones(config.hidden_size), config.rms_norm_eps),
            mlp=GatedMLP.init(mlp, config),
        )

    def __call__(self, x: Array, cos: Array, sin: Array, attend: Attend[T]) -> tuple[Array, T]:
        attended, extra = self.self_attn(self.input_layernorm(x), cos, sin, attend)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), extra


class DecoderForCausalLM(EasyDeLBaseModule):
    """A decoder-only language model. Families differ in how they read ``config.json``, not here.

    The layers' parameters are stacked on a leading axis. Dense layers see one flat token axis, so that a weight's
    gradient is one plain matrix product; only attention sees rows.
    """

    embed_tokens: Embedding
    layers: DecoderLayer
    norm: RMSNorm
    lm_head: Linear | None

    layer_prefix: ClassVar[str] = "model.layers."
    # The last dimensions of each; what leads them (the layers) is whole.
    partition_rules: ClassVar[PartitionRules] = (
        (r"(^|\.)v_(row|col)\.", P()),  # Adafactor's moments, a row or a column for each matrix
        (r"embed_tokens\.weight|lm_head\.weight", P("tp", "fsdp")),
        (r"(q|k|v|gate|up)_proj\.(weight\.scale|bias)", P("tp")),
        (r"(q|k|v|gate|up)_proj\.weight", P("tp", "fsdp")),
        (r"(o|down)_proj\.weight\.scale", P("fsdp")),
        (r"(o|down)_proj\.weight", P("fsdp", "tp")),
        # An adapter's outer dimensions lie as the weight's do; its rank is whole everywhere.
        (r"(q|k|v|gate|up)_proj\.lora\.a", P("fsdp")),
        (r"(q|k|v|gate|up)_proj\.lora\.b", P("tp", None)),
        (r"(o|down)_proj\.lora\.a", P("tp")),
        (r"(o|down)_proj\.lora\.b", P("fsdp", None)),
    )

    @classmethod
    def weight_map_for(cls, config: EasyDeLBaseConfig) -> WeightMap:
        layers = tuple(range(config.num_hidden_layers))
        return WeightMap(
            (
                TensorRule("model.embed_tokens.weight", ("embed_tokens.weight",)),
                *(rule.under("layers", f"{cls.layer_prefix}{LAYER}", layers) for rule in LAYER_RULES),
                TensorRule("model.norm.weight", ("norm.weight",)),
                TensorRule("lm_head.weight"),
            )
        )

    @classmethod
    def init(cls, config: EasyDeLBaseConfig, key: PRNGKeyArray, dtype: Any = jnp.float32) -> DecoderForCausalLM:
        embedding, head, layers = jax.random.split(key, 3)
        std = config.initializer_range
        return cls(
            config=config,
            dtype=jnp.dtype(dtype),
            embed_tokens=Embedding(std * jax.random.normal(embedding, (config.vocab_size, config.hidden_size))),
            layers=jax.vmap(lambda key: DecoderLayer.init(key, config))(
                jax.random.split(layers, config.num_hidden_layers)
            ),
            norm=RMSNorm(jnp.ones(config.hidden_size), config.rms_norm_eps),
            lm_head=None
            if config.tie_word_embeddings
            else Linear.init(head, config.hidden_size, config.vocab_size, std, bias=False),
        )

    @property
    def output_embedding(self) -> Float[Array, "vocab hidden"]:
        weight = self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        assert not isinstance(weight, QuantizedWeight)  # only the layers' weights are
        return weight.astype(self.dtype)

    def hidden_states(
        self,
        input_ids: Int[Array, "rows length"],
        position_ids: Int[Array, "rows length"],
        segment_ids: Int[Array, "rows length"],
        branch_ids: Int[Array, "rows length"],
        remat: bool = False,
    ) -> Float[Array, "rows length hidden"]:
        rows, length = input_ids.shape
        ids = TokenIds(segment_ids, branch_ids, position_ids)

        def attend(q, k, v, window):
            q, k, v = (x.reshape(rows, length, *x.shape[1:]) for x in (q, k, v))
            attended = tree_attention(q, k, v, ids, AttentionOptions(window), backend=self.attention_backend)
            return attended.reshape(rows * length, *attended.shape[2:]), None

        def one_layer(x, layer, cos, sin, window):
            x, _ = layer(x, cos, sin, lambda q, k, v: attend(q, k, v, window))
            return constrain(x, DATA_AXES)

        # What attention leaves is as small as a layer's input, and dear to compute anew.
        one_layer = jax.checkpoint(one_layer, policy=keep_attention if remat else KEEP_PRODUCTS)
        x = self._embed(input_ids)
        cos, sin = self._angles(position_ids)
        windows, is_uniform = self._windows()
        if is_uniform:
            x, _ = jax.lax.scan(lambda x, layer: (one_layer(x, layer, cos, sin, windows), None), x, self.layers)
        else:
            x, _ = jax.lax.scan(lambda x, xs: (one_layer(x, xs[0], cos, sin, xs[1]), None), x, (self.layers, windows))
        return self.norm(x).reshape(rows, length, -1)

    def hidden_states_with_cache(
        self,
        input_ids: Int[Array, "rows new"],
        position_ids: Int[Array, "rows new"],
        cache: KeyValueCache,
    ) -> tuple[Float[Array, "rows new hidden"], KeyValueCache]:
        rows, new = input_ids.shape
        positions = jax.lax.dynamic_update_slice(cache.positions, position_ids, (0, cache.length))
        ids = TokenIds.of_sequences(positions)
        x = self._embed(input_ids)
        cos, sin = self._angles(position_ids)
        windows, is_uniform = self._windows()
        if is_uniform:
            windows = jnp.full(self.config.num_hidden_layers, cache.positions.shape[1] if windows is None else windows)

        def one_layer(x, xs):
            layer, keys, values, window = xs

            def attend(q, k, v):
                q, k, v = (y.reshape(rows, new, *y.shape[1:]) for y in (q, k, v))
                all_keys = jax.lax.dynamic_update_slice(keys, k.astype(keys.dtype), (0, cache.length, 0, 0))
                all_values = jax.lax.dynamic_update_slice(values, v.astype(values.dtype), (0, cache.length, 0, 0))
                options = AttentionOptions(window)
                attended = tree_attention(q, all_keys, all_values, ids, options, query_start=cache.length)
                return attended.reshape(rows * new, *attended.shape[2:]), (all_keys, all_values)

            return layer(x, cos, sin, attend)

        x, (keys, values) = jax.lax.scan(one_layer, x, (self.layers, cache.keys, cache.values, windows))
        hidden = self.norm(x).reshape(rows, new, -1)
        return hidden, KeyValueCache(keys, values, positions, cache.length + new)

    def _embed(self, input_ids: Int[Array, "rows length"]) -> Float[Array, "tokens hidden"]:
        return constrain(self.embed_tokens.weight[input_ids.reshape(-1)].astype(self.dtype), DATA_AXES)

    def _angles(self, position_ids: Int[Array, "rows length"]) -> tuple[Array, Array]:
        config = self.config
        frequencies = rotary_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        return rotary_angles(position_ids.reshape(-1), frequencies)

    def _windows(self) -> tuple[int | Array | None, bool]:
        """One window for all layers where they agree, else one a layer: a static None costs the mask nothing."""
        windows = self.config.layer_windows
        if len(set(windows)) == 1:
            return windows[0], True
        return jnp.array([jnp.iinfo(jnp.int32).max if w is None else w for w in windows], jnp.int32), False

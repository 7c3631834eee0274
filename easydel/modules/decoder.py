"""Run the decoder that all families share, embedding, stacked layers and final norm, in one forward pass.

Read on in this order:

1. `easydel.modules.llama`: a family, that is, keys of its config and choices of its layers.
2. `easydel.infra.base_config`: the config, whose fields and properties the forward pass below reads.
3. `DecoderForCausalLM.hidden_states`, below.
4. `easydel.layers.decoder_layer`: the order of the norms; then `attention`, `mlp`, `norm`, `rotary` beside it.
5. `easydel.layers.layer_stacks`: the loop over layers of several shapes.
6. `easydel.ops.attention.tree_attention`: attention over trees, and `easydel.ops.linear_log_probs`: the head.
7. `easydel.infra.language_model`: the head's options, and `easydel.infra.base_module`: files, adapters, generation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, PRNGKeyArray

from easydel.infra.base_config import EasyDeLBaseConfig
from easydel.infra.base_module import EasyDeLBaseModule
from easydel.infra.language_model import AuxiliarySums, KeyValueCache, ModelOutput
from easydel.infra.mesh import PartitionRules, constrain
from easydel.layers.attention import SelfAttention
from easydel.layers.decoder_layer import DecoderLayer, PreNormLayer
from easydel.layers.embedding import Embedding
from easydel.layers.layer_stacks import scan_stacks
from easydel.layers.linear import Linear, QuantizedWeight
from easydel.layers.mlp import GatedMLP
from easydel.layers.norm import RMSNorm
from easydel.layers.rotary import Angles, table_angles
from easydel.ops.attention.inputs import AttentionOptions, TokenIds
from easydel.ops.attention.residuals import keep_attention
from easydel.ops.attention.tree_attention import tree_attention
from easydel.ops.mesh_axes import DATA_AXES
from easydel.weights.weight_map import LAYER, TensorRule, WeightMap, linear

# Save the outputs of matrix products only: recomputing any other activation costs no more than reading it again.
KEEP_PRODUCTS = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable, keep_attention
)
# The tensors of one layer, in Hugging Face's names.
LAYER_RULES = (
    TensorRule("input_layernorm.weight"),
    TensorRule("post_attention_layernorm.weight"),
    *(rule for name in "qkvo" for rule in linear(f"self_attn.{name}_proj")),
    TensorRule("self_attn.q_norm.weight"),
    TensorRule("self_attn.k_norm.weight"),
    *(rule for name in ("gate", "up", "down") for rule in linear(f"mlp.{name}_proj")),
)
NO_WINDOW = jnp.iinfo(jnp.int32).max
KeysAndValues = tuple[Array, Array]


class LayerSettings(NamedTuple):
    """Settings, not parameters, in which layers of one shape may differ.

    Attributes:
      window: tokens that a query sees back; None for all, or where the setting is held elsewhere.
      rotary: index into the config's rotary tables; None where the setting is held elsewhere.
    """

    window: int | Int[Array, "*layers"] | None
    rotary: int | Int[Array, "*layers"] | None


class DecoderForCausalLM(EasyDeLBaseModule):
    """A decoder-only language model; a family adds how it reads ``config.json`` and chooses the parts of its layers.

    Layers of one shape are stacked on a leading axis; where a family has several shapes, there is one stack for each
    kind (`EasyDeLBaseConfig.layer_kinds`). Dense layers see one flat token axis, so that a weight's gradient is one
    plain matrix product; only attention sees rows.
    """

    embed_tokens: Embedding
    layers: DecoderLayer | dict[str, DecoderLayer]
    norm: RMSNorm
    lm_head: Linear | None

    layer_prefix: ClassVar[str] = "model.layers."
    layer_rules: ClassVar[tuple[TensorRule, ...]] = LAYER_RULES
    # Partitions of the last dimensions; leading ones (the stacked layers) are whole on every device.
    partition_rules: ClassVar[PartitionRules] = (
        (r"(^|\.)v_(row|col)\.", P()),  # Adafactor's moments: one row or column per matrix, whole everywhere
        (r"embed_tokens\.weight|lm_head\.weight", P("tp", "fsdp")),
        (r"(q|k|v|gate|up)_proj\.(weight\.scale|bias)", P("tp")),
        (r"(q|k|v|gate|up)_proj\.weight", P("tp", "fsdp")),
        (r"(o|down)_proj\.weight\.scale", P("fsdp")),
        (r"(o|down)_proj\.weight", P("fsdp", "tp")),
        # An adapter's outer dimensions are split as the weight's are; its rank is whole everywhere.
        (r"(q|k|v|gate|up)_proj\.lora\.a", P("fsdp")),
        (r"(q|k|v|gate|up)_proj\.lora\.b", P("tp", None)),
        (r"(o|down)_proj\.lora\.a", P("tp")),
        (r"(o|down)_proj\.lora\.b", P("fsdp", None)),
    )

    @classmethod
    def weight_map_for(cls, config: EasyDeLBaseConfig) -> WeightMap:
        stacks = config.layer_stacks.items()
        return WeightMap(
            (
                TensorRule("model.embed_tokens.weight", ("embed_tokens.weight",)),
                *(
                    rule.under(path, f"{cls.layer_prefix}{LAYER}", layers)
                    for path, layers in stacks
                    for rule in cls.layer_rules
                ),
                TensorRule("model.norm.weight", ("norm.weight",)),
                TensorRule("lm_head.weight"),
            )
        )

    @classmethod
    def init_layer(cls, key: PRNGKeyArray, config: Any, kind: str) -> DecoderLayer:  # noqa: ARG003  for overriding
        """One layer with random parameters; a family overrides it to choose other parts than Llama's.

        Args:
          key: draws the weights.
          config: of the family's own class.
          kind: an entry of `EasyDeLBaseConfig.layer_kinds`; most families have one kind.
        """
        attention, mlp = jax.random.split(key)
        norm = functools.partial(RMSNorm.init, eps=config.rms_norm_eps)
        return PreNormLayer(
            input_layernorm=norm(config.hidden_size),
            self_attn=SelfAttention.init(
                attention,
                config.hidden_size,
                config.num_attention_heads,
                config.num_key_value_heads,
                config.head_dim,
                config.initializer_range,
                qkv_bias=config.qkv_bias,
                output_bias=config.attention_output_bias,
                norm=norm if config.qk_norm else None,
            ),
            post_attention_layernorm=norm(config.hidden_size),
            mlp=GatedMLP.init(
                mlp, config.hidden_size, config.intermediate_size, config.initializer_range, bias=config.mlp_bias
            ),
        )

    @classmethod
    def init_norm(cls, config: Any) -> RMSNorm:
        """The norm after the last layer, not yet trained."""
        return RMSNorm.init(config.hidden_size, config.rms_norm_eps)

    @classmethod
    def init(cls, config: EasyDeLBaseConfig, key: PRNGKeyArray, dtype: Any = jnp.float32) -> DecoderForCausalLM:
        embedding, head, layers = jax.random.split(key, 3)
        std = config.initializer_range
        layer_keys = jax.random.split(layers, config.num_hidden_layers)
        stacks = {
            kind: jax.vmap(functools.partial(cls.init_layer, config=config, kind=kind))(layer_keys[jnp.array(numbers)])
            for kind, numbers in config.layers_of_kind.items()
        }
        return cls(
            config=config,
            dtype=jnp.dtype(dtype),
            embed_tokens=Embedding.init(embedding, config.vocab_size, config.hidden_size, std),
            layers=stacks if len(stacks) > 1 else next(iter(stacks.values())),
            norm=cls.init_norm(config),
            lm_head=None
            if config.tie_word_embeddings
            else Linear.init(head, config.hidden_size, config.vocab_size, std, bias=False),
        )

    @property
    def output_embedding(self) -> Float[Array, "vocab hidden"]:
        weight = self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        assert not isinstance(weight, QuantizedWeight)  # only the layers' weights are
        return weight.astype(self.dtype)

    @property
    def _stacks(self) -> dict[str, DecoderLayer]:
        """The stack of layers of each kind."""
        return self.layers if isinstance(self.layers, dict) else {self.config.layer_kinds[0]: self.layers}

    def empty_cache(self, rows: int, slots: int) -> KeyValueCache:
        def empty(stack: DecoderLayer) -> KeysAndValues:
            attention = stack.self_attn
            layers = attention.k_proj.weight.shape[0]
            zeros = jnp.zeros((layers, rows, slots, attention.kv_heads, attention.head_dim), self.dtype)
            return zeros, zeros

        no_token = jnp.full((rows, slots), -1, jnp.int32)
        layers = {kind: empty(stack) for kind, stack in self._stacks.items()}
        return KeyValueCache(layers, TokenIds.of_sequences(no_token), jnp.int32(0))

    def hidden_states(
        self,
        input_ids: Int[Array, "rows length"],
        ids: TokenIds,
        *,
        cache: KeyValueCache | None = None,
        remat: bool = False,
    ) -> ModelOutput:
        config, (rows, length) = self.config, input_ids.shape
        start = None if cache is None else cache.length

        def with_past(past: Array | None, new: Array) -> Array:
            """The slots of the cache with the new tokens put in; without a cache, the new tokens."""
            if past is None or start is None:
                return new
            return jax.lax.dynamic_update_slice_in_dim(past, new.astype(past.dtype), start, axis=1)

        all_ids = ids if cache is None else TokenIds(*map(with_past, cache.ids, ids))
        is_token = (ids.segment > 0).reshape(-1)

        def one_layer(
            x: Array, layer: DecoderLayer, angles: Angles, settings: LayerSettings, past: KeysAndValues | None
        ) -> tuple[Array, KeysAndValues | None, AuxiliarySums]:
            def attend(q: Array, k: Array, v: Array) -> tuple[Array, KeysAndValues | None]:
                q, k, v = (x.reshape(rows, length, *x.shape[1:]) for x in (q, k, v))
                keys, values = map(with_past, past or (None, None), (k, v))
                options = AttentionOptions(settings.window, config.attention_scale, config.attention_soft_cap)
                attended = tree_attention(
                    q, keys, values, all_ids, options, query_start=start, backend=self.attention_backend
                )
                return attended.reshape(rows * length, *attended.shape[2:]), None if past is None else (keys, values)

            if settings.rotary is not None:
                angles = Angles(*(of_table[settings.rotary] for of_table in angles))
            x, kept, auxiliary = layer(x, angles, attend, is_token)
            return constrain(x, DATA_AXES), kept, auxiliary

        # Save the attention output in any case: it is as small as the layer input and expensive to recompute.
        one_layer = jax.checkpoint(one_layer, policy=keep_attention if remat else KEEP_PRODUCTS)
        positions = ids.position.reshape(-1)
        tables = [table_angles(table, positions, config.head_dim) for table in config.rotary_tables]

        def body_of(shared: LayerSettings) -> Callable[[Array, Any], tuple[Array, Any]]:
            angles = Angles(*map(jnp.stack, zip(*tables))) if shared.rotary is None else tables[shared.rotary]

            def body(x: Array, inputs: Any) -> tuple[Array, Any]:
                layer, (window, rotary), past = inputs
                window = shared.window if window is None else window
                x, kept, auxiliary = one_layer(x, layer, angles, LayerSettings(window, rotary), past)
                return x, (kept, auxiliary)

            return body

        bodies, inputs = {}, {}
        for kind, stack in self._stacks.items():
            shared, per_layer = _settings(config, config.layers_of_kind[kind])
            bodies[kind] = body_of(shared)
            inputs[kind] = (stack, per_layer, None if cache is None else cache.layers[kind])
        x = self.embed_tokens(input_ids.reshape(-1), self.dtype, config.embedding_scale)
        x, outputs = scan_stacks(bodies, constrain(x, DATA_AXES), inputs, config.layer_kinds)
        if cache is not None:
            cache = KeyValueCache({kind: kept for kind, (kept, _) in outputs.items()}, all_ids, cache.length + length)
        auxiliary = _sum_over_layers([sums for _, sums in outputs.values()])
        return ModelOutput(self.norm(x).reshape(rows, length, -1), cache, auxiliary)


def _settings(config: EasyDeLBaseConfig, numbers: Sequence[int]) -> tuple[LayerSettings, LayerSettings]:
    """The settings that these layers share, and arrays of those that differ; each setting is None in one of the two.

    A shared setting is static, so that a mask without a window costs nothing.
    """
    windows, rotary = ([values[number] for number in numbers] for values in (config.layer_windows, config.layer_rotary))
    has_one_window, has_one_table = len(set(windows)) == 1, len(set(rotary)) == 1
    shared = LayerSettings(windows[0] if has_one_window else None, rotary[0] if has_one_table else None)
    per_layer = LayerSettings(
        None if has_one_window else jnp.array([NO_WINDOW if size is None else size for size in windows], jnp.int32),
        None if has_one_table else jnp.array(rotary, jnp.int32),
    )
    return shared, per_layer


def _sum_over_layers(of_stacks: Iterable[AuxiliarySums]) -> AuxiliarySums:
    """Total of each auxiliary sum, from values stacked over the layers of each kind."""
    total: dict[str, Array] = {}
    for sums in of_stacks:
        for name, of_layers in sums.items():
            total[name] = total.get(name, jnp.float32(0)) + jnp.sum(of_layers, axis=0)
    return total

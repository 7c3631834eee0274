"""What a language model is: a config, a dtype, the maps and rules of its parameters, a forward pass and a head.

Whatever works on models (adapters, quantised weights, files, generation, scoring) knows them by this class.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Self

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from easydel.infra.base_config import EasyDeLBaseConfig
from easydel.infra.mesh import PartitionRules
from easydel.ops.attention.tree_attention import AttentionBackend, check_backend_name
from easydel.weights.weight_map import WeightMap


class KeyValueCache(NamedTuple):
    """Keys and values of the tokens so far; a position of -1 marks a slot that nobody sees."""

    keys: Float[Array, "layers rows slots kv_heads head_dim"]
    values: Float[Array, "layers rows slots kv_heads head_dim"]
    positions: Int[Array, "rows slots"]
    length: Int[Array, ""]


class LanguageModel(eqx.Module):
    """A causal language model that is a pytree of its parameters.

    Attributes:
      config: shape of the model, static.
      dtype: dtype that activations and products are computed in, static; parameters keep theirs.
      attention_backend: key of `easydel.ops.attention.tree_attention.BACKENDS` that attention over whole rows runs on,
        static; None chooses by device, dtype and head size. It changes speed and memory, not what the model computes,
        so it is no part of `model_digest`.

    Raises:
      ValueError: there is no such backend.
    """

    config: EasyDeLBaseConfig = eqx.field(static=True)
    dtype: np.dtype = eqx.field(static=True)
    attention_backend: AttentionBackend | None = eqx.field(static=True, default=None, kw_only=True)

    model_type: ClassVar[str]
    layer_prefix: ClassVar[str]
    partition_rules: ClassVar[PartitionRules]

    def __check_init__(self) -> None:
        check_backend_name(self.attention_backend)

    @classmethod
    @abc.abstractmethod
    def weight_map_for(cls, config: EasyDeLBaseConfig) -> WeightMap:
        """How a model of this config corresponds to the tensors of its folder."""

    @property
    def weight_map(self) -> WeightMap:
        """How this model's arrays correspond to the tensors of its folder."""
        return self.weight_map_for(self.config)

    def share_in_use(self, path: str) -> float:
        """The share of a linear layer's weight that one token meets; less than 1 where experts share the work."""
        return 1.0

    @classmethod
    @abc.abstractmethod
    def read_config(cls, raw: Mapping[str, Any]) -> EasyDeLBaseConfig:
        """Read the family's ``config.json``.

        Raises:
          ValueError: names each key that is missing, wrong, or not computed.
        """

    @classmethod
    @abc.abstractmethod
    def family_keys(cls, config: EasyDeLBaseConfig) -> dict[str, Any]:
        """The keys that this family adds to ``config.json``: what `read_config` reads beside those of every family."""

    @classmethod
    @abc.abstractmethod
    def init(cls, config: EasyDeLBaseConfig, key: PRNGKeyArray, dtype: Any = jnp.float32) -> Self:
        """A model with random parameters."""

    @property
    @abc.abstractmethod
    def output_embedding(self) -> Float[Array, "vocab hidden"]:
        """The head: a token's logit is its row times the hidden state."""

    @abc.abstractmethod
    def hidden_states(
        self,
        input_ids: Int[Array, "rows length"],
        position_ids: Int[Array, "rows length"],
        segment_ids: Int[Array, "rows length"],
        branch_ids: Int[Array, "rows length"],
        remat: bool = False,
    ) -> Float[Array, "rows length hidden"]:
        """Final normalised hidden states of rows of trees; `remat` rebuilds each layer in the backward pass."""

    @abc.abstractmethod
    def hidden_states_with_cache(
        self, input_ids: Int[Array, "rows new"], position_ids: Int[Array, "rows new"], cache: KeyValueCache
    ) -> tuple[Float[Array, "rows new hidden"], KeyValueCache]:
        """Hidden states of new tokens that see the cached ones, and the cache with them added."""

    def __call__(self, input_ids: Int[Array, "rows length"]) -> Float[Array, "rows length vocab"]:
        """Logits of plain sequences, float32."""
        position_ids = jnp.broadcast_to(jnp.arange(input_ids.shape[1]), input_ids.shape)
        ones, zeros = jnp.ones_like(position_ids), jnp.zeros_like(position_ids)
        hidden = self.hidden_states(input_ids, position_ids, ones, zeros)
        return jnp.einsum("rld,vd->rlv", hidden, self.output_embedding, preferred_element_type=jnp.float32)

    def empty_cache(self, rows: int, slots: int) -> KeyValueCache:
        """A cache with room for `slots` tokens in each row."""
        config = self.config
        shape = (config.num_hidden_layers, rows, slots, config.num_key_value_heads, config.head_dim)
        zeros = jnp.zeros(shape, self.dtype)
        return KeyValueCache(zeros, zeros, jnp.full((rows, slots), -1, jnp.int32), jnp.int32(0))

"""Define the abstract language model: config, dtype, weight map, sharding rules, one forward pass and one head.

All code that works on models (adapters, quantised weights, files, generation, scoring) knows them by this class.
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
from easydel.ops.attention.inputs import TokenIds
from easydel.ops.attention.tree_attention import AttentionBackend, check_backend_name
from easydel.ops.linear_log_probs import linear_log_collision, linear_log_probs, linear_logits
from easydel.weights.weight_map import WeightMap

# Sums that layers return for losses beside the main one: name -> sum over all tokens but padding.
AuxiliarySums = Mapping[str, Array]


class KeyValueCache(NamedTuple):
    """Keys and values of the tokens so far, in slots that fill up from the left.

    Attributes:
      layers: for each kind of layer (`EasyDeLBaseConfig.layer_kinds`) its keys and its values,
        ``[layers, rows, slots, kv_heads, head_dim]``.
      ids: segment, branch and position of the token in each slot; segment 0 marks an empty slot, which no token sees.
      length: slots in use.
    """

    layers: Mapping[str, tuple[Array, Array]]
    ids: TokenIds
    length: Int[Array, ""]


class ModelOutput(NamedTuple):
    """The result of a forward pass.

    Attributes:
      hidden: final normalised hidden states, in the compute dtype.
      cache: the given cache with the new tokens added; None without one.
      auxiliary: sums for losses beside the main one, by name, over layers and all tokens but padding. Dense families
        return none.
    """

    hidden: Float[Array, "rows length hidden"]
    cache: KeyValueCache | None
    auxiliary: AuxiliarySums


class LanguageModel(eqx.Module):
    """A causal language model that is a pytree of its parameters.

    Attributes:
      config: shape of the model, static.
      dtype: dtype that activations and products are computed in, static; parameters keep theirs.
      attention_backend: key of `easydel.ops.attention.tree_attention.BACKENDS` for attention over whole rows, static;
        None chooses by device, dtype and head size. It changes speed and memory, not what the model computes, so
        `easydel.weights.fingerprint.model_digest` leaves it out.
      model_type: the family's name in ``config.json``.
      layer_prefix: start of the names of a layer's tensors, before its number, e.g. "model.layers.".
      partition_rules: sharding of every parameter by its path.

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
        """The correspondence of the arrays of a model of this config and the tensors of its folder."""

    @property
    def weight_map(self) -> WeightMap:
        """The correspondence of this model's arrays and the tensors of its folder."""
        return self.weight_map_for(self.config)

    def share_in_use(self, path: str) -> float:
        """The share of a linear layer's weight that one token uses; below 1 in a mixture of experts."""
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
        """The head's weight ``W``, in the compute dtype; logits before scale and soft-cap are ``W h``."""

    @abc.abstractmethod
    def hidden_states(
        self,
        input_ids: Int[Array, "rows length"],
        ids: TokenIds,
        *,
        cache: KeyValueCache | None = None,
        remat: bool = False,
    ) -> ModelOutput:
        """Run the layers over rows of trees: the one forward pass of training, scoring and generation.

        Args:
          input_ids: the tokens.
          ids: segment, branch and position of each token.
          cache: keys and values of the earlier tokens, which the new tokens see as well; None where rows begin here.
          remat: recompute each layer in the backward pass instead of keeping its activations.

        Returns:
          Hidden states, the cache with the new tokens, and auxiliary sums.

        Example:
          >>> from easydel.modules.llama import LlamaForCausalLM
          >>> raw = dict(vocab_size=8, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1)
          >>> model = LlamaForCausalLM.init(LlamaForCausalLM.read_config(raw), jax.random.key(0))
          >>> tokens = jnp.array([[1, 5, 7]])
          >>> output = model.hidden_states(tokens, TokenIds.of_sequences(jnp.array([[0, 1, 2]])))
          >>> output.hidden.shape
          (1, 3, 4)
          >>> bool((model.logits(output.hidden) == model(tokens)).all())
          True
        """

    @abc.abstractmethod
    def empty_cache(self, rows: int, slots: int) -> KeyValueCache:
        """A cache with room for `slots` tokens in each row."""

    def __call__(self, input_ids: Int[Array, "rows length"]) -> Float[Array, "rows length vocab"]:
        """Logits of plain sequences, float32."""
        positions = jnp.broadcast_to(jnp.arange(input_ids.shape[1]), input_ids.shape)
        return self.logits(self.hidden_states(input_ids, TokenIds.of_sequences(positions)).hidden)

    def logits(self, hidden: Float[Array, "rows length hidden"]) -> Float[Array, "rows length vocab"]:
        """Scaled and capped logits of final hidden states, float32."""
        config = self.config
        return linear_logits(hidden, self.output_embedding, config.logit_soft_cap, config.logit_scale)

    def log_probs(
        self,
        hidden: Float[Array, "rows length hidden"],
        targets: Int[Array, "rows length"],
        count: int | Int[Array, ""] | None = None,
    ) -> Float[Array, "rows length"]:
        """Log-probabilities of target tokens under the softmax of `logits`, in nats, without holding all logits.

        Arguments and result are those of `easydel.ops.linear_log_probs.linear_log_probs`.
        """
        config = self.config
        return linear_log_probs(
            hidden,
            self.output_embedding,
            targets,
            count,
            soft_cap=config.logit_soft_cap,
            logit_scale=config.logit_scale,
        )

    def log_collision(
        self, hidden: Float[Array, "rows length hidden"], count: int | Int[Array, ""] | None = None
    ) -> Float[Array, "rows length"]:
        """Log-probability that two draws from the softmax of `logits` agree, in nats; see `linear_log_collision`."""
        config = self.config
        return linear_log_collision(
            hidden, self.output_embedding, count, soft_cap=config.logit_soft_cap, logit_scale=config.logit_scale
        )

"""The arithmetic that an update cannot do without, whoever does it."""

from __future__ import annotations

import numpy as np

from easydel.data.batching.packing import Batch
from easydel.infra.base_config import EasyDeLBaseConfig


def layer_weights(config: EasyDeLBaseConfig) -> int:
    """Entries of all the layers' weight matrices, embedding and head not among them."""
    hidden, size = config.hidden_size, config.head_dim
    queries, keys_values = config.num_attention_heads * size, config.num_key_value_heads * size
    attention = hidden * (queries + 2 * keys_values) + queries * hidden
    return config.num_hidden_layers * (attention + 3 * hidden * config.intermediate_size)


def flops_by_part(config: EasyDeLBaseConfig, batch: Batch) -> dict[str, float]:
    """Floating-point operations of one forward pass over a batch of trees; padding counts nothing.

    .. math:: 2 W n, \\quad 4 L d_a \\textstyle\\sum_i (p_i + 1), \\quad 2 d V m

    of the layers' weights, attention and the head, with W `layer_weights`, n tokens, L layers, d_a = heads times
    head_dim, p_i the position of token i in its own sequence (so that it sees p_i + 1 keys), d the hidden size, V the
    vocabulary and m the scored tokens.
    """
    is_token = batch["segment_ids"] > 0
    tokens, scored = np.count_nonzero(is_token), np.count_nonzero(batch["target_slots"] >= 0)
    keys_seen = float(np.sum(batch["position_ids"][is_token] + 1, dtype=np.int64))
    attention_width = config.num_attention_heads * config.head_dim
    return {
        "products of the layers": 2.0 * layer_weights(config) * tokens,
        "attention": 4.0 * config.num_hidden_layers * attention_width * keys_seen,
        "head": 2.0 * config.hidden_size * config.vocab_size * scored,
    }


def forward_flops(config: EasyDeLBaseConfig, batch: Batch) -> float:
    """The sum of `flops_by_part`."""
    return sum(flops_by_part(config, batch).values())


def update_flops(config: EasyDeLBaseConfig, batch: Batch, *, scores_reference: bool) -> float:
    """The same for an update: forward, two gradients as dear as it, and a forward pass of a reference that is scored.

    What is computed again to save memory counts nothing.
    """
    return (4.0 if scores_reference else 3.0) * forward_flops(config, batch)

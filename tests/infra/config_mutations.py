"""Random damage to a ``config.json``: what a program must read or refuse in one short error."""

from __future__ import annotations

import copy
import random
from typing import Any

ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 7, 2**31, 2**64, 10**30, 10**400, -(10**30), 0.0, -0.5, 1e-300, 1e308, 0.1,
    "", "x", "1e400", "\x1b[31m", "silu", "full_attention", [], [[]], [None], [1, 2], ["sliding_attention"], {},
    {"a": 1}, {"rope_type": "llama3"}, {"rope_type": "linear", "factor": 0}, {"type": "linear", "factor": -4.0},
    {"rope_type": ["x"]}, {"rope_theta": 0, "rope_type": "default"}, {"full_attention": {"rope_theta": 1.0}},
    [[[[[[[[]]]]]]]], "y" * 5000,
)  # fmt: skip
NEW_KEYS = (
    "rope_scaling", "rope_parameters", "rope_theta", "sliding_window", "use_sliding_window", "max_window_layers",
    "layer_types", "head_dim", "num_key_value_heads", "attention_bias", "mlp_bias", "attention_dropout",
    "partial_rotary_factor", "quantization_config", "quantization", "logit_scale", "use_qk_norm", "num_experts",
    "auto_map", "pretraining_tp", "is_causal", "original_max_position_embeddings", "", "z" * 3000, "\x1b]0;x\x07",
)  # fmt: skip


def mutated(config: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """A copy with one to four keys of any depth replaced, removed or added."""
    config = copy.deepcopy(config)
    for _ in range(rng.randint(1, 4)):
        inner = [value for value in config.values() if isinstance(value, dict) and value]
        place = rng.choice(inner) if inner and rng.random() < 0.3 else config
        action = rng.choice(("replace", "remove", "add"))
        if action == "add" or not place:
            place[rng.choice(NEW_KEYS)] = copy.deepcopy(rng.choice(ODD))
        elif action == "remove":
            del place[rng.choice(list(place))]
        else:
            place[rng.choice(list(place))] = copy.deepcopy(rng.choice(ODD))
    return config

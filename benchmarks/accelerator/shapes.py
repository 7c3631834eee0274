"""Models of published shapes with random weights, and pairs of made token ids."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from easydel.data.tree import PreferencePair

LEARNING_RATE = 1e-5


@dataclasses.dataclass(frozen=True)
class Shape:
    """A Qwen2 model by the fields of its ``config.json``, and how long the parts of a pair are.

    Lengths are drawn uniformly between two bounds: those of a prompt and those of a completion, in tokens.
    """

    config: dict[str, Any]
    prompt: tuple[int, int] = (64, 384)
    completion: tuple[int, int] = (64, 384)


def _qwen2(**sizes: int) -> dict[str, Any]:
    return {
        "model_type": "qwen2",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        "max_position_embeddings": 32768,
        "initializer_range": 0.02,
    } | sizes


SHAPES = {
    "0.5b": Shape(
        _qwen2(
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            vocab_size=151936,
        )
    ),
    "1.5b": Shape(
        _qwen2(
            hidden_size=1536,
            intermediate_size=8960,
            num_hidden_layers=28,
            num_attention_heads=12,
            num_key_value_heads=2,
            vocab_size=151936,
        )
    ),
    "tiny": Shape(
        _qwen2(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=512,
        ),
        prompt=(4, 40),
        completion=(4, 40),
    ),
}


def made_pairs(shape: Shape, count: int, seed: int = 0) -> list[PreferencePair]:
    """Pairs of uniformly drawn token ids in which every completion token is scored; one seed gives the same pairs."""
    rng = np.random.default_rng(seed)

    def draw(bounds: tuple[int, int]) -> np.ndarray:
        length = rng.integers(bounds[0], bounds[1] + 1)
        return rng.integers(1, shape.config["vocab_size"], length).astype(np.int32)

    pairs = []
    for index in range(count):
        prompt, chosen, rejected = draw(shape.prompt), draw(shape.completion), draw(shape.completion)
        masks = (np.ones(ids.size, bool) for ids in (chosen, rejected))
        pairs.append(PreferencePair(prompt, chosen, rejected, *masks, index=index))
    return pairs

"""Tiny models and pairs that many tests share."""

from __future__ import annotations

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import pytest

from easydel.data.preference import PreferencePair
from easydel.infra.base_config import EasyDeLBaseConfig
from easydel.modules.llama import LlamaForCausalLM

VOCABULARY = 64


def tiny_config(**changes) -> EasyDeLBaseConfig:
    values = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "layer_windows": (None, None),
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
    }
    return EasyDeLBaseConfig(**(values | changes))


def random_pair(rng: np.random.Generator, index: int, longest: int = 40) -> PreferencePair:
    prompt, chosen, rejected = rng.integers(1, longest, 3)
    ids = [rng.integers(1, VOCABULARY, size).astype(np.int32) for size in (prompt, chosen, rejected)]
    masks = [rng.random(size) < 0.8 for size in (chosen, rejected)]
    for mask in masks:
        mask[-1] = True
    return PreferencePair(*ids, *masks, index=index)


@pytest.fixture(scope="session")
def tiny_model() -> LlamaForCausalLM:
    return LlamaForCausalLM.init(tiny_config(), jax.random.key(0))


@pytest.fixture(scope="session")
def pairs() -> list[PreferencePair]:
    rng = np.random.default_rng(0)
    return [random_pair(rng, index) for index in range(7)]

"""A model may name its attention backend, which is no part of what the model is."""

from __future__ import annotations

import dataclasses
from typing import get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easydel.cli.dpo import RunOptions
from easydel.modules.auto import AutoEasyDeLModelForCausalLM
from easydel.modules.llama import LlamaForCausalLM
from easydel.ops.attention.tree_attention import BACKENDS, AttentionBackend
from easydel.weights.fingerprint import model_digest
from tests.tiny import tiny_config


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return LlamaForCausalLM.init(tiny_config(), jax.random.key(0))


def test_the_name_is_kept_and_changes_neither_the_digest_nor_the_numbers(model, tmp_path):
    model.save_pretrained(tmp_path)
    named = AutoEasyDeLModelForCausalLM.from_pretrained(str(tmp_path), attention_backend="xla")
    assert named.attention_backend == "xla" and model.attention_backend is None
    assert named.merge_lora().attention_backend == named.apply_lora_to_layers(2).attention_backend == "xla"
    assert model_digest(named) == model_digest(model)
    tokens = jnp.array([[1, 2, 3]])
    np.testing.assert_array_equal(named(tokens), model(tokens))


def test_a_backend_that_cannot_run_here_is_refused_where_it_would_run(model):
    named = dataclasses.replace(model, attention_backend="tpu")
    if jax.default_backend() != "tpu":
        with pytest.raises(ValueError, match="attention_backend='tpu' cannot compute this attention; it needs a TPU"):
            named(jnp.array([[1, 2, 3]]))


def test_an_unknown_backend_is_refused_at_once(model, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="attention_backend='flash': expected None or one of 'cudnn', 'tpu', 'xla'"):
        AutoEasyDeLModelForCausalLM.from_pretrained(str(tmp_path), attention_backend="flash")


def test_the_command_line_offers_the_backends_there_are():
    choices, _none = get_args(get_type_hints(RunOptions)["attention_backend"])
    assert get_args(choices) == get_args(AttentionBackend) == tuple(BACKENDS)

"""The profile of an update gives every moment to one part of the model."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from benchmarks.suite.operation_times import Event, Origin, events, origins, seconds_by_operation
from easydel.modules.llama import LlamaForCausalLM
from easydel.ops.attention.inputs import TokenIds
from easydel.ops.linear_log_probs import linear_log_probs
from tests.tiny import tiny_config


def test_a_moment_in_which_several_operations_run_is_split_between_them():
    executions = [Event("a", 0, 4e9), Event("b", 2e9, 4e9), Event("a", 6e9, 7e9)]
    assert seconds_by_operation(executions) == {"a": 4.0, "b": 1.0}


@pytest.fixture(scope="module")
def gradient():
    """The compiled gradient of a tiny model's log-probs, and its arguments."""
    config = tiny_config()
    model = LlamaForCausalLM.init(config, jax.random.key(0))
    ids = jnp.arange(64)[None] % config.vocab_size

    def loss(model):
        hidden = model.hidden_states(ids, TokenIds.of_sequences(jnp.arange(64)[None])).hidden
        return linear_log_probs(hidden, model.output_embedding, ids).sum()

    return jax.jit(jax.grad(loss)).lower(model).compile(), model


def test_operations_are_known_by_the_files_they_come_from(gradient):
    found = set(origins(gradient[0].as_text()).values())
    for part in ("attention", "products of the layers", "norms, activations, rotations"):
        assert {Origin(part, is_backward=False), Origin(part, is_backward=True)} <= found, part
    assert Origin("head", is_backward=False) in found


def test_a_trace_holds_the_operations_of_the_program(gradient, tmp_path):
    compiled, model = gradient
    jax.block_until_ready(compiled(model))
    with jax.profiler.trace(tmp_path):
        jax.block_until_ready(compiled(model))
    known = origins(compiled.as_text())
    seconds = seconds_by_operation(events(tmp_path, known))
    assert {known[operation].part for operation in seconds} >= {"attention", "head", "products of the layers"}
    assert all(time >= 0 for time in seconds.values())


def test_a_folder_without_a_trace_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="no \\*.xplane.pb"):
        events(tmp_path, [])

"""Run by test_backends.py in a process of its own: largest differences over meshes, as JSON."""

import json
from functools import partial
from unittest import mock

import equinox as eqx
import jax
import jax.numpy as jnp

from easydel.infra.mesh import create_mesh, put_batch
from easydel.modules.llama import LlamaForCausalLM
from easydel.ops.attention.inputs import AttentionOptions, TokenIds
from easydel.ops.attention.tpu import tree_attention_tpu
from easydel.ops.attention.tree_attention import BACKENDS, Backend, over_mesh
from easydel.ops.attention.xla import tree_attention_xla
from tests.ops.attention.forest import forest, values, with_gradients
from tests.tiny import tiny_config

# Mesh, rows, query heads, key heads.
CASES = {
    "rows": ((2, 4, 1, 1, 1), 8, 2, 1),
    "rows and heads": ((2, 2, 1, 2, 1), 4, 4, 2),
    "more devices than key heads": ((1, 2, 1, 4, 1), 2, 4, 2),
    "nothing divides": ((1, 2, 1, 4, 1), 3, 3, 1),
}
interpreted = partial(tree_attention_tpu, interpret=True)


def gradients_of_a_model(dims: tuple[int, ...]) -> list[jax.Array]:
    """Of a model on a mesh, one of whose layers slides and whose layers are rebuilt in the backward pass."""
    mesh = create_mesh(dims)
    model = LlamaForCausalLM.init(tiny_config(layer_windows=(None, 8)), jax.random.key(0)).shard(mesh)
    segment_ids, branch_ids, position_ids = put_batch(forest(4, 100, 30)._asdict(), mesh).values()
    input_ids = jax.random.randint(jax.random.key(1), segment_ids.shape, 0, model.config.vocab_size)

    def loss(model):
        hidden = model.hidden_states(input_ids, TokenIds(segment_ids, branch_ids, position_ids), remat=True).hidden
        return jnp.mean(jnp.sin(hidden))

    with jax.set_mesh(mesh):
        return jax.tree.leaves(jax.device_get(eqx.filter_jit(jax.grad(loss))(model)))


def main() -> None:
    differences = {}
    for name, (dims, rows, heads, kv_heads) in CASES.items():
        arrays, ids = values(rows, 100, heads, kv_heads, 8), forest(rows, 100, 30)
        expected = with_gradients(tree_attention_xla)(*arrays, ids, AttentionOptions(9))
        with jax.set_mesh(create_mesh(dims)):
            found = with_gradients(over_mesh(interpreted))(*arrays, ids, AttentionOptions(jnp.int32(9)))
        differences[name] = max(float(abs(jax.device_get(x) - y).max()) for x, y in zip(found, expected))
    expected = gradients_of_a_model((1, 4, 1, 2, 1))
    with mock.patch.dict(BACKENDS, {"xla": Backend(lambda _call: [], interpreted)}):
        found = gradients_of_a_model((1, 4, 1, 2, 1))
    differences["a model"] = max(float(abs(x - y).max()) for x, y in zip(found, expected, strict=True))
    print(json.dumps(differences))


if __name__ == "__main__":
    main()

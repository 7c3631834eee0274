"""Run by test_tree_attention_form.py in a process of its own: largest differences over meshes, as JSON."""

import json
from functools import partial

import jax
import jax.numpy as jnp

from easydel.infra.mesh import create_mesh
from easydel.ops.tree_attention_form import over_mesh
from easydel.ops.tree_attention_tpu import tree_attention_tpu
from easydel.ops.tree_attention_xla import tree_attention_xla
from tests.ops.forest import forest, values, with_gradients

# Mesh, rows, query heads, key heads.
CASES = {
    "rows": ((2, 4, 1, 1, 1), 8, 2, 1),
    "rows and heads": ((2, 2, 1, 2, 1), 4, 4, 2),
    "more devices than key heads": ((1, 2, 1, 4, 1), 2, 4, 2),
    "nothing divides": ((1, 2, 1, 4, 1), 3, 3, 1),
}


def main() -> None:
    differences = {}
    interpreted = partial(tree_attention_tpu, interpret=True)
    for name, (dims, rows, heads, kv_heads) in CASES.items():
        arrays, ids = values(rows, 100, heads, kv_heads, 8), forest(rows, 100, 30)
        expected = with_gradients(tree_attention_xla)(*arrays, *ids, 9)
        with jax.set_mesh(create_mesh(dims)):
            found = with_gradients(over_mesh(interpreted))(*arrays, *ids, jnp.int32(9))
        differences[name] = max(float(abs(jax.device_get(x) - y).max()) for x, y in zip(found, expected))
    print(json.dumps(differences))


if __name__ == "__main__":
    main()

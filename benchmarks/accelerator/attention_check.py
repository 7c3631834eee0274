"""How far the attention made for a device is from float32, beside how far XLA's is: one JSON object as last line."""

from __future__ import annotations

import argparse
import json
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.accelerator.shapes import SHAPES, Shape, made_pairs
from easydel.data.batching.packing import PackingLayout, pack
from easydel.ops.attention.inputs import AttentionOptions, TokenIds
from easydel.ops.attention.tpu import tree_attention_tpu
from easydel.ops.attention.tree_attention import AttentionCall, Run, choose_backend, device_in_use
from easydel.ops.attention.xla import tree_attention_xla

WINDOWS = (None, 100)


def own_backend(q: jax.Array) -> Run:
    """The device's backend; on CPU, which has none, the TPU's in the interpreter, so that the check can be tried."""
    if jax.default_backend() == "cpu":
        return partial(tree_attention_tpu, interpret=True)
    run = choose_backend(AttentionCall(q.dtype, q.shape[-1], AttentionOptions(), device_in_use())).run
    if run is tree_attention_xla:
        raise SystemExit(f"there is no attention of its own for {jax.devices()[0].device_kind} and {q.dtype}.")
    return run


def relative_errors(shape: Shape, pairs: int = 8) -> list[dict[str, Any]]:
    """Relative errors in norm of the output and of the gradients of queries, keys and values, in bfloat16."""
    batch = pack(made_pairs(shape, pairs), PackingLayout(padding_value=0))
    ids = TokenIds(*(jnp.array(batch[name]) for name in ("segment_ids", "branch_ids", "position_ids")))
    heads, kv_heads = shape.config["num_attention_heads"], shape.config["num_key_value_heads"]
    size = shape.config["hidden_size"] // heads
    arrays = tuple(
        jax.random.normal(key, (*ids.segment.shape, count, size)).astype(jnp.bfloat16)
        for key, count in zip(jax.random.split(jax.random.key(0), 4), (heads, kv_heads, kv_heads, heads))
    )

    def results(backend: Run, window: int | None, dtype: Any) -> tuple[jax.Array, ...]:
        def run(q, k, v, cotangent):
            out, pull_back = jax.vjp(lambda q, k, v: backend(q, k, v, ids, AttentionOptions(window)), q, k, v)
            return out, *pull_back(cotangent)

        with jax.default_matmul_precision("highest"):
            return jax.jit(run)(*(x.astype(dtype) for x in arrays))

    rows = []
    for window in WINDOWS:
        exact = results(tree_attention_xla, window, jnp.float32)
        for name, backend in {"own": own_backend(arrays[0]), "XLA": tree_attention_xla}.items():
            found = results(backend, window, jnp.bfloat16)
            errors = [
                float(jnp.linalg.norm(x.astype(jnp.float32) - y) / jnp.linalg.norm(y)) for x, y in zip(found, exact)
            ]
            rows.append({"window": window, "backend": name} | dict(zip(("out", "dq", "dk", "dv"), errors)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    print(json.dumps(relative_errors(SHAPES[parser.parse_args().shape])))


if __name__ == "__main__":
    main()

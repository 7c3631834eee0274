"""Run stacked layers in their order, with one `jax.lax.scan` over each run of layers of one shape."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

Carry = TypeVar("Carry", bound=PyTree)
# (carry, one layer's inputs) -> (carry, one layer's outputs), as the body of `jax.lax.scan`.
Body = Callable[[Carry, Any], tuple[Carry, Any]]


def scan_stacks(
    bodies: Mapping[str, Body[Carry]], carry: Carry, stacks: Mapping[str, PyTree], kinds: Sequence[str]
) -> tuple[Carry, dict[str, PyTree]]:
    """Run layers of several kinds in order, as a loop over `kinds` would that takes the next layer of each stack.

    Where the order repeats a pattern, one scan runs over the repetitions: the program is as large as the pattern, not
    as the model, and no stack is copied.

    Args:
      bodies: kind -> function that runs one of its layers.
      carry: the value that goes from layer to layer.
      stacks: kind -> the inputs of its layers, stacked on a leading axis in their order.
      kinds: the kind of each layer.

    Returns:
      The last carry, and for each kind the outputs of its layers, stacked in their order.

    Example:
      >>> add = lambda x, y: (x + y, x)
      >>> scale = lambda x, y: (x * y, x)
      >>> stacks = {"add": jnp.array([1.0, 2.0]), "scale": jnp.array([10.0, 10.0])}
      >>> float(scan_stacks({"add": add, "scale": scale}, 0.0, stacks, ["add", "scale"] * 2)[0])
      120.0
    """
    runs = [(kind, len(list(group))) for kind, group in itertools.groupby(kinds)]
    period = next(size for size in range(1, len(runs) + 1) if runs == runs[:size] * (len(runs) // size))
    repeats = len(runs) // period
    if repeats == 1:
        return _run_once(bodies, carry, stacks, runs)
    by_repeat = jax.tree.map(lambda leaf: leaf.reshape(repeats, -1, *leaf.shape[1:]), dict(stacks))
    carry, outputs = jax.lax.scan(lambda carry, once: _run_once(bodies, carry, once, runs[:period]), carry, by_repeat)
    return carry, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), outputs)


def _run_once(
    bodies: Mapping[str, Body[Carry]], carry: Carry, stacks: Mapping[str, PyTree], runs: Sequence[tuple[str, int]]
) -> tuple[Carry, dict[str, PyTree]]:
    """Run each run of equal layers once; every stack holds exactly the layers of its kind in `runs`."""
    outputs: dict[str, list[PyTree]] = {}
    used = dict.fromkeys(stacks, 0)
    for kind, count in runs:
        start, stop = used[kind], used[kind] + count
        used[kind] = stop
        layers = jax.tree.map(functools.partial(_slice, start=start, stop=stop), stacks[kind])
        carry, out = jax.lax.scan(bodies[kind], carry, layers)
        outputs.setdefault(kind, []).append(out)
    return carry, {
        kind: of_runs[0] if len(of_runs) == 1 else jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *of_runs)
        for kind, of_runs in outputs.items()
    }


def _slice(leaf: Array, start: int, stop: int) -> Array:
    return leaf if (start, stop) == (0, leaf.shape[0]) else leaf[start:stop]

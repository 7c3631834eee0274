"""The rate of large float32 matrix products: what an update's arithmetic is compared with.

python -m benchmarks.suite.matmul
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

import jax
import jax.numpy as jnp

# A layer's largest product in SmolLM2-135M over 4096 tokens, and a square one. [rows, inner, columns]
SHAPES = {"4096 x 576 x 1536": (4096, 576, 1536), "2048 x 2048 x 2048": (2048, 2048, 2048)}
REPEATS = 15


def rate(rows: int, inner: int, columns: int) -> float:
    """FLOP/s of one product, the median of some."""
    keys = jax.random.split(jax.random.key(0))
    x, y = jax.random.normal(keys[0], (rows, inner)), jax.random.normal(keys[1], (inner, columns))
    multiply = jax.jit(jnp.matmul)
    multiply(x, y).block_until_ready()
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        multiply(x, y).block_until_ready()
        seconds.append(time.perf_counter() - started)
    return 2 * rows * inner * columns / median(seconds)


def matmul_rates() -> dict[str, float]:
    """FLOP/s of each shape, in a process of its own."""
    words = [sys.executable, "-m", "benchmarks.suite.matmul"]
    root = Path(__file__).parents[2]
    return json.loads(subprocess.run(words, cwd=root, capture_output=True, text=True, check=True).stdout)


def matmul_rate(measured: Sequence[Mapping[str, float]]) -> float:
    """FLOP/s of the quickest shape, the median over what was measured before, between and after."""
    return max(median(rates[shape] for rates in measured) for shape in SHAPES)


def main() -> None:
    print(json.dumps({name: rate(*shape) for name, shape in SHAPES.items()}))


if __name__ == "__main__":
    main()

"""How fast the devices multiply matrices."""

from __future__ import annotations

import functools
import time

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

# Dense bfloat16 peak a device in FLOP/s, from the makers' data sheets.
DATA_SHEET = {
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
}
MEASURED_SIZE = 2048


def peak_flops(mesh: Mesh) -> float:
    """FLOP/s of all devices of a mesh: the data sheet's for a known accelerator, else a measured float32 product."""
    kind = mesh.devices.flat[0].device_kind
    known = next((peak for name, peak in DATA_SHEET.items() if name in kind), None)
    # Virtual CPU devices share one processor, so a CPU is measured once however many devices it plays.
    return known * mesh.size if known is not None else measured_flops()


@functools.cache
def measured_flops() -> float:
    """FLOP/s of one large float32 matrix product on the first device, the best of three."""
    x = jnp.ones((MEASURED_SIZE, MEASURED_SIZE), jnp.float32)
    multiply = jax.jit(jnp.matmul)
    multiply(x, x).block_until_ready()
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        multiply(x, x).block_until_ready()
        seconds.append(time.perf_counter() - started)
    return 2 * MEASURED_SIZE**3 / min(seconds)

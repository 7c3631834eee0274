"""Look up or measure the rate at which devices multiply matrices."""

from __future__ import annotations

import functools
import re
import time

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

# Dense peak of matrix products with 16-bit inputs and float32 sums, in FLOP/s per device (NVIDIA's sheets print twice
# that, "with sparsity"). Names are whole words of a device kind; the first that matches counts.
DATA_SHEET = {
    "H100 PCIe": 756e12,  # NVIDIA H100 data sheet
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,  # NVIDIA H200 data sheet
    "GH200": 989e12,  # NVIDIA GH200 data sheet
    "A100": 312e12,  # NVIDIA A100 data sheet
    "L40S": 362e12,  # NVIDIA L40S data sheet
    "L4": 121e12,  # NVIDIA L4 data sheet
    "T4": 65e12,  # NVIDIA T4 data sheet, float16: it has no bfloat16
    "RTX 4090": 165e12,  # NVIDIA Ada GPU architecture, appendix A
    # Google Cloud TPU, system architecture
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}
MEASURED_SIZE = 2048


def peak_flops(mesh: Mesh) -> float:
    """FLOP/s of all devices of a mesh: from the data sheet of a known accelerator, else from a measured product."""
    known = data_sheet_flops(mesh.devices.flat[0].device_kind)
    # Virtual CPU devices share one processor, so a CPU is measured once, however many devices it has.
    return known * mesh.size if known is not None else measured_flops()


def data_sheet_flops(device_kind: str) -> float | None:
    """Peak FLOP/s of one device by its kind ("NVIDIA H100 80GB HBM3"); None where it is not in `DATA_SHEET`."""
    return next((peak for name, peak in DATA_SHEET.items() if re.search(rf"\b{name}\b", device_kind)), None)


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

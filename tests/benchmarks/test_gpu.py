"""The benchmark of accelerators, as far as it runs without one."""

from __future__ import annotations

import gzip
import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from benchmarks.accelerator.kernel_shares import kernel_shares
from easydel.infra.device import data_sheet_flops

ROOT = Path(__file__).parents[2]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_do():
    process = run()
    assert process.returncode == 1
    assert 'JAX sees no GPU here but "' in process.stderr and "--tiny" in process.stderr


@pytest.mark.slow
def test_a_tiny_model_goes_all_the_way(tmp_path):
    process = run("--tiny", "--variants", "attention by XLA", "--output", str(tmp_path))
    assert process.returncode == 0, process.stderr
    (path,) = tmp_path.glob("gpu-*.json")
    result = json.loads(path.read_text())["shapes"]["tiny"]
    assert [row["form"] for row in result["attention"]] == ["own", "XLA"] * 2
    for variant in result["variants"].values():
        assert variant["losses"][0] == pytest.approx(math.log(2), abs=1e-3)
        assert variant["seconds"] > 0 and variant["planned_bytes"] > 0
    assert sum(result["variants"]["as compared"]["kernel_shares"]["kinds"].values()) == pytest.approx(1)


def test_shares_count_a_kernel_once_and_what_the_host_does_never(tmp_path):
    def event(name, duration, pid, tid, **args):
        return {"ph": "X", "name": name, "ts": 0, "dur": duration, "pid": pid, "tid": tid, "args": args}

    def label(kind, name, pid, **tid):
        return {"ph": "M", "name": kind, "pid": pid, **tid, "args": {"name": name}}

    events = [
        label("process_name", "/device:GPU:0", 1),
        label("thread_name", "Stream #13(Compute)", 1, tid=1),
        label("thread_name", "XLA Modules", 1, tid=2),
        label("process_name", "/host:CPU", 2),
        label("thread_name", "python", 2, tid=1),
        event("nvjet_hsh_128x256", 60.0, 1, 1, hlo_op="cublas-gemm.3"),
        event("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", 30.0, 1, 1, hlo_op="custom-call.7"),
        event("loop_add_fusion", 10.0, 1, 1, hlo_op="loop_add_fusion"),
        event("jit_step", 100.0, 1, 2, hlo_op="whole"),
        event("launch", 500.0, 2, 1, hlo_op="loop_add_fusion"),
    ]
    (tmp_path / "x.trace.json.gz").write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    shares = kernel_shares(tmp_path)
    assert shares["busy_seconds"] == pytest.approx(100e-6)
    assert shares["kinds"] == {"matrix products": 0.6, "attention": 0.3, "elementwise and reductions": 0.1}
    assert shares["kernels"][0]["kernel"] == "nvjet_hsh_128x256"


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("Tesla T4", 65),
        ("NVIDIA GeForce RTX 4090", 165),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v6 lite", 918),
    ],
)
def test_a_known_device_has_the_peak_of_its_data_sheet(kind, tera):
    assert data_sheet_flops(kind) == tera * 1e12


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA L40", "NVIDIA T400", "NVIDIA GeForce RTX 5090"])
def test_an_unknown_device_has_no_peak(kind):
    assert data_sheet_flops(kind) is None

"""Which form runs where, and that a mesh does not change its numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from easydel.infra.mesh import AXIS_NAMES, DATA_AXES
from easydel.ops.attention import backends as tree_attention_form
from easydel.ops.attention.backends import device_form
from easydel.ops.attention.cudnn import tree_attention_cudnn
from easydel.ops.attention.tpu import tree_attention_tpu
from easydel.ops.attention.xla import tree_attention_xla


def form_on(platform: str, dtype, head_dim: int = 64):
    device = AbstractDevice(device_kind="some", num_cores=1, platform=platform)
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("dp",), abstract_device=device)):
        return device_form(jax.ShapeDtypeStruct((1, 128, 2, head_dim), dtype))


def test_the_mesh_in_use_says_which_form_runs(monkeypatch):
    monkeypatch.setattr(tree_attention_form, "_has_flash_kernels", lambda: True)
    assert form_on("cpu", jnp.bfloat16) is tree_attention_xla
    assert form_on("tpu", jnp.bfloat16) is form_on("tpu", jnp.float32) is tree_attention_tpu
    assert form_on("gpu", jnp.bfloat16) is tree_attention_cudnn
    assert form_on("gpu", jnp.float32) is form_on("gpu", jnp.bfloat16, head_dim=256) is tree_attention_xla


def test_a_gpu_without_flash_kernels_is_left_to_xla(monkeypatch):
    monkeypatch.setattr(tree_attention_form, "_has_flash_kernels", lambda: False)
    assert form_on("gpu", jnp.bfloat16) is tree_attention_xla


def test_without_a_mesh_several_devices_are_left_to_xla(monkeypatch):
    q = jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.bfloat16)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert device_form(q) is tree_attention_tpu
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert device_form(q) is tree_attention_xla


def test_rows_and_heads_are_split_over_axes_that_the_mesh_has():
    assert tree_attention_form.ROW_AXES == DATA_AXES
    assert tree_attention_form.HEAD_AXIS in AXIS_NAMES


@pytest.fixture(scope="module")
def differences() -> dict[str, float]:
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    process = subprocess.run(
        [sys.executable, "-m", "tests.ops.attention.split_attention"],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout)


@pytest.mark.parametrize(
    "case", ["rows", "rows and heads", "more devices than key heads", "nothing divides", "a model"]
)
def test_eight_devices_give_outputs_and_gradients_of_one(differences, case):
    assert differences[case] < 1e-5

"""Which backend runs where, and that a mesh does not change its numbers."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from easydel.ops.attention.inputs import DEFAULT_OPTIONS, AttentionOptions
from easydel.ops.attention.tree_attention import BACKENDS, AttentionCall, choose_backend, device_in_use, tree_attention
from tests.eight_devices import on_eight_devices
from tests.ops.attention.forest import forest, values

CPU, TPU = (AbstractDevice(device_kind=kind, num_cores=1, platform=kind) for kind in ("cpu", "tpu"))
HOPPER = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=1, platform="gpu")
OTHER_GPU = AbstractDevice(device_kind="AMD Instinct MI300X", num_cores=1, platform="gpu")


def chosen(device, dtype=jnp.bfloat16, head_dim=64, options=DEFAULT_OPTIONS) -> str:
    backend = choose_backend(AttentionCall(dtype, head_dim, options, device))
    return next(name for name, entry in BACKENDS.items() if entry is backend)


def test_the_device_dtype_and_head_size_say_which_backend_runs():
    assert chosen(CPU) == chosen(OTHER_GPU) == "xla"
    assert chosen(TPU) == chosen(TPU, jnp.float32) == "tpu"
    assert chosen(HOPPER) == chosen(HOPPER, jnp.float16) == "cudnn"
    assert chosen(HOPPER, jnp.float32) == chosen(HOPPER, head_dim=256) == chosen(HOPPER, head_dim=12) == "xla"


def test_an_option_that_a_backend_lacks_leaves_the_call_to_xla():
    assert chosen(HOPPER, options=AttentionOptions(soft_cap=50.0)) == "xla"
    assert chosen(HOPPER, options=AttentionOptions(window=9, scale=0.5)) == "cudnn"
    assert chosen(TPU, options=AttentionOptions(9, 0.5, 50.0)) == "tpu"


def test_a_gpu_that_is_here_says_its_generation_itself(monkeypatch):
    def gpu(kind, version, capability):
        client = SimpleNamespace(platform_version=version)
        return SimpleNamespace(device_kind=kind, client=client, compute_capability=capability)

    here = [gpu("Tesla T4", "cuda 12000", "7.5"), gpu("NVIDIA A100", "cuda 12000", "8.0"), gpu("MI300X", "rocm 6", "9")]
    monkeypatch.setattr(jax, "devices", lambda: here)
    kinds = [AbstractDevice(device_kind=device.device_kind, num_cores=1, platform="gpu") for device in here]
    assert [chosen(kind) for kind in kinds] == ["xla", "cudnn", "xla"]


def test_the_mesh_in_use_says_which_device_computes():
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("dp",), abstract_device=HOPPER)):
        assert device_in_use() == HOPPER


def test_without_a_mesh_several_devices_are_left_to_xla(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert device_in_use() == AbstractDevice(
        device_kind=jax.devices()[0].device_kind, num_cores=None, platform=jax.default_backend()
    )
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert device_in_use() is None and chosen(None) == "xla"


@pytest.mark.parametrize(
    ("name", "dtype", "options", "words"),
    [
        ("cudnn", jnp.float32, DEFAULT_OPTIONS, "NVIDIA GPU .* and bfloat16 or float16, got float32"),
        ("cudnn", jnp.bfloat16, AttentionOptions(soft_cap=5.0), "scores without soft-cap, got soft_cap=5.0"),
        ("tpu", jnp.float32, DEFAULT_OPTIONS, "needs a TPU, got cpu"),
        ("flash", jnp.float32, DEFAULT_OPTIONS, "expected None or one of 'cudnn', 'tpu', 'xla'"),
    ],
)
def test_a_backend_that_cannot_is_refused_with_what_it_lacks(name, dtype, options, words):
    mesh = AbstractMesh((1,), ("dp",), abstract_device=CPU)
    arrays, ids = values(1, 64, 2, 2, 64, dtype)[:3], forest(1, 64, 20)
    with jax.sharding.use_abstract_mesh(mesh), pytest.raises(ValueError, match=words):
        tree_attention(*arrays, ids, options, backend=name)


@pytest.fixture(scope="module")
def differences() -> dict[str, float]:
    return on_eight_devices("tests.ops.attention.split_attention")


@pytest.mark.parametrize(
    "case", ["rows", "rows and heads", "more devices than key heads", "nothing divides", "a model"]
)
def test_eight_devices_give_outputs_and_gradients_of_one(differences, case):
    assert differences[case] < 1e-5

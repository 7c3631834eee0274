"""A mesh changes where numbers are computed, not the numbers."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.eight_devices import on_eight_devices
from tests.trainers.direct_preference_optimization_trainer.mesh_trace import METRICS

MESHES = {
    "dp": (8, 1, 1, 1, 1),
    "fsdp": (1, -1, 1, 1, 1),
    "fsdp x tp": (1, 4, 1, 2, 1),
    "dp x fsdp x tp": (2, 2, 1, 2, 1),
}
SHARES = {"dp": 1, "fsdp": 1 / 8, "fsdp x tp": 1 / 8, "dp x fsdp x tp": 1 / 4}


@pytest.fixture(scope="module")
def results() -> dict:
    return on_eight_devices("tests.trainers.direct_preference_optimization_trainer.mesh_trace", json.dumps(MESHES))


@pytest.mark.parametrize("mesh", MESHES)
def test_eight_devices_give_the_trace_of_one(results, mesh):
    for metric in METRICS:
        difference = np.abs(np.subtract(results[mesh][metric], results["one device"][metric])).max()
        print(f"{mesh:15} {metric:16} largest difference {difference:.1e}")
        np.testing.assert_allclose(results[mesh][metric], results["one device"][metric], rtol=1e-5, atol=1e-5)


def test_eight_devices_train_adapters_as_one_does(results):
    one, eight = (results[f"adapters, {mesh}"] for mesh in ("one device", "fsdp x tp"))
    for metric in METRICS:
        np.testing.assert_allclose(eight[metric], one[metric], rtol=1e-5, atol=1e-5)
    assert eight["base_is_shared"] and eight["moments_agree"]
    assert eight["specs"] == {
        "mlp.up_proj.weight": "P(None, 'tp', 'fsdp')",
        "mlp.up_proj.lora.a": "P(None, None, 'fsdp')",
        "mlp.up_proj.lora.b": "P(None, 'tp', None)",
        "mlp.down_proj.weight": "P(None, 'fsdp', 'tp')",
        "mlp.down_proj.lora.a": "P(None, None, 'tp')",
        "mlp.down_proj.lora.b": "P(None, 'fsdp', None)",
    }


def test_factored_moments_on_eight_devices_give_the_trace_of_one(results):
    one, eight = (results[f"adafactor, {mesh}"] for mesh in ("one device", "fsdp x tp"))
    for metric in METRICS:
        np.testing.assert_allclose(eight[metric], one[metric], rtol=1e-5, atol=1e-5)
    # The momentum has the parameter's shape and lies as it does.
    assert set(eight["moment_specs"]) == {eight["spec"]} and eight["share"] == 1 / 8


def test_quantised_weights_lie_as_the_weights_did(results):
    assert results["int8 specs"] == {
        "up_proj.values": "P(None, 'tp', 'fsdp')",
        "up_proj.scale": "P(None, 'tp')",
        "down_proj.values": "P(None, 'fsdp', 'tp')",
        "down_proj.scale": "P(None, 'fsdp')",
    }


@pytest.mark.parametrize("mesh", MESHES)
def test_reference_and_moments_lie_as_the_parameters_do(results, mesh):
    found = results[mesh]
    assert found["share"] == SHARES[mesh]
    assert found["reference_spec"] == found["spec"]
    assert set(found["moment_specs"]) == {found["spec"]}

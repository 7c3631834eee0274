"""The data sheets of devices."""

from __future__ import annotations

import pytest

from easydel.infra.device import data_sheet_flops


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

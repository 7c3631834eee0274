"""Which objectives there are and which options each honours: data, read by validation, documentation and tests."""

from __future__ import annotations

# Objective -> the options of `DPOConfig` that change it.
LOSS_OPTIONS: dict[str, frozenset[str]] = {
    "sigmoid": frozenset({"label_smoothing"}),
}

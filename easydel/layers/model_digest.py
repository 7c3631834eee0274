"""Tell models apart by a digest of all that changes their numbers."""

from __future__ import annotations

import dataclasses
from typing import Any

from easydel.infra.fingerprint import fingerprint
from easydel.infra.language_model import LanguageModel
from easydel.layers.lora import adapters


def model_digest(model: LanguageModel) -> dict[str, Any]:
    """All that decides what a model computes, in JSON types: family, shape, compute dtype, adapters, weights."""
    told_apart = {field.name for field in dataclasses.fields(model.config) if field.compare}
    shape = {name: value for name, value in dataclasses.asdict(model.config).items() if name in told_apart}
    settings = {path: [adapter.alpha, adapter.use_rslora, adapter.dropout] for path, adapter in adapters(model).items()}
    return {
        "family": model.model_type,
        "shape": shape,
        "dtype": str(model.dtype),
        "adapters": settings,
        "weights": fingerprint(model),
    }

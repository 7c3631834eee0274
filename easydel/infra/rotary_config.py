"""Read the rotary settings of ``config.json``: the base, and the scaling of frequencies."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from easydel.errors import shown
from easydel.infra.config_keys import LARGEST_INDEX, Key, number, only, read_keys, text, whole

DEFAULT_THETA = 10000.0
ROPE_THETA = number(1, 1e15, default=None, null=None)
ROTARY_KEYS: dict[str, Key] = {
    "rope_theta": ROPE_THETA,
    "rope_type": text(),
    "type": text(),
    "partial_rotary_factor": only(1.0),
}
FACTOR = number(1, 1e6)
ROTARY_KINDS: dict[str, dict[str, Key]] = {
    "default": {"factor": only(1.0)},
    "linear": {"factor": FACTOR},
    "llama3": {
        "factor": FACTOR,
        "low_freq_factor": number(1e-6, 1e6),
        "high_freq_factor": number(1e-6, 1e6),
        "original_max_position_embeddings": whole(1, LARGEST_INDEX, default=None, null=None),
    },
}


@dataclasses.dataclass(frozen=True)
class RotaryScaling:
    """Scaling of rotary frequencies for lengths beyond those a model was first trained on.

    ``linear`` divides every frequency by `factor`. ``llama3`` divides those whose wavelength is longer than
    ``original_max_position_embeddings / low_freq_factor``, keeps those shorter than
    ``original_max_position_embeddings / high_freq_factor`` and blends in between (Llama 3 Herd of Models, 2024).
    """

    rope_type: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


class RotaryTable(NamedTuple):
    """Base and scaling of rotary frequencies, from which the angles of positions are computed."""

    theta: float
    scaling: RotaryScaling | None = None


def read_rotary(values: Mapping[str, Any]) -> RotaryTable:
    """Base and scaling, from ``rope_theta`` and ``rope_scaling`` or the newer ``rope_parameters``.

    Raises:
      ValueError: the settings contradict one another, or are of a kind that is not computed.
    """
    readings = {
        name: _read_one(name, values[name], values) for name in ("rope_parameters", "rope_scaling") if values[name]
    }
    if len(set(readings.values())) > 1:  # transformers 5 would take rope_scaling, transformers 4 knows no other
        raise ValueError(
            f'config.json has "rope_parameters": {shown(values["rope_parameters"], 120)} and "rope_scaling": '
            f"{shown(values['rope_scaling'], 120)}, which say different things; remove the wrong one."
        )
    return next(iter(readings.values()), RotaryTable(float(values["rope_theta"] or DEFAULT_THETA)))


def _read_one(name: str, rope: Mapping[str, Any], values: Mapping[str, Any]) -> RotaryTable:
    kinds = {rope[key] for key in ("rope_type", "type") if isinstance(rope.get(key), str)}
    if len(kinds) > 1:
        raise ValueError(f'config.json has two kinds in "{name}": {shown(rope, 120)}; rope_type and type must agree.')
    kind = next(iter(kinds), "default")
    if kind not in ROTARY_KINDS:
        raise ValueError(f"config.json asks for rope_type {shown(kind)}; supported are {', '.join(ROTARY_KINDS)}.")
    read = read_keys(rope, ROTARY_KEYS | ROTARY_KINDS[kind], f'"{name}" of config.json (rope_type "{kind}")')
    thetas = {float(theta) for theta in (read["rope_theta"], values["rope_theta"]) if theta is not None}
    if len(thetas) > 1:
        raise ValueError(
            f'config.json has "rope_theta": {values["rope_theta"]} and another one in "{name}": {read["rope_theta"]}; '
            "remove the wrong one."
        )
    theta = next(iter(thetas), DEFAULT_THETA)
    if kind == "default":
        return RotaryTable(theta)
    settings: dict[str, Any] = {"rope_type": kind} | {key: read[key] for key in ROTARY_KINDS[kind]}
    if kind == "llama3":
        settings["original_max_position_embeddings"] = (
            settings["original_max_position_embeddings"] or values["max_position_embeddings"]
        )
        if settings["high_freq_factor"] <= settings["low_freq_factor"]:
            raise ValueError(
                f'config.json has "high_freq_factor": {settings["high_freq_factor"]} in "{name}", which must be above '
                f'"low_freq_factor": {settings["low_freq_factor"]}.'
            )
    return RotaryTable(theta, RotaryScaling(**settings))

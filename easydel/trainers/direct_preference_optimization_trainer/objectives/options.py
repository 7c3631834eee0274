"""The objectives with the options and the reference that each needs: data for validation, documentation and tests."""

from __future__ import annotations

_F = frozenset({"f_divergence_type", "f_alpha_divergence_coef"})
_SMOOTHING = frozenset({"label_smoothing"})

# Objective -> the options of `DPOConfig`, besides beta, that change it.
LOSS_OPTIONS: dict[str, frozenset[str]] = {
    "sigmoid": _SMOOTHING | _F,
    "hinge": _F,
    "ipo": _F,
    "sigmoid_norm": _F,
    "exo_pair": _SMOOTHING | _F,
    "nca_pair": _F,
    "robust": _SMOOTHING | _F,
    "bco_pair": _F,
    "sppo_hard": _F,
    "aot": _SMOOTHING,
    "aot_unpaired": _SMOOTHING,
    "aot_pair": _SMOOTHING,
    "apo_zero": frozenset(),
    "apo_down": _F,
    "discopop": _F | {"discopop_tau"},
    "sft": frozenset(),
}

# They look at the policy alone and read no log-ratio, so a run of only these needs no reference.
LOSSES_WITHOUT_REFERENCE = frozenset({"sft"})

# They compare sorted values of all pairs of an update, so a part of the update is not enough for them.
SORTING_LOSSES = frozenset({"aot", "aot_unpaired", "aot_pair"})

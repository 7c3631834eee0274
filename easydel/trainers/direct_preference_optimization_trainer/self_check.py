"""Is the first update's margin what it has to be?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from easydel.trainers.trainer_protocol import SelfCheckError

# Nats, and a share of the log-probs' size. Policy and reference run the same arithmetic on the same batch, but in two
# compiled programs: the compiler may fuse, and in bfloat16 round, in different places.
FIRST_STEP_TOLERANCE = 1e-3
FIRST_STEP_RELATIVE_TOLERANCE = {"float32": 1e-6, "bfloat16": 2e-3}


def check_margin_at_start(metrics: Mapping[str, Any], *, beta: float, dtype: np.dtype, advice: str) -> None:
    """Policy and reference are the same model before the first update, so every pair's margin between them is 0.

    Args:
      metrics: of the first update.
      beta: scale of the rewards among them.
      dtype: that both models compute in.
      advice: what else to say where the check fails.

    Raises:
      SelfCheckError: the two are scored differently, or the reference's log-probs are another model's.
    """
    # The mean size: margins that cancel out would hide log-probs that belong to other pairs.
    margin = float(metrics["rewards/margin_size"]) / beta
    size = abs(float(metrics["logps/chosen"])) + abs(float(metrics["logps/rejected"]))
    tolerance = FIRST_STEP_TOLERANCE + FIRST_STEP_RELATIVE_TOLERANCE[str(dtype)] * size
    if not margin <= tolerance:
        raise SelfCheckError(
            "self-check failed: policy and reference are the same model before the first update, but their "
            f"log-ratio margins are {margin:.3g} nats on average, not 0 within {tolerance:.1g} "
            f"(loss {float(metrics['loss']):.6f}).{advice}"
        )

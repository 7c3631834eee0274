"""Check the number types that a model's parameters are kept in and its products computed in."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from easydel.errors import shown

FLOAT_TYPES = ("float32", "bfloat16", "float16")
# Of these training computes and keeps parameters in; float16 ends at 65504 and 6e-8, and losses are not scaled here.
TRAINABLE_TYPES = ("float32", "bfloat16")


def float_dtype(name: str, value: Any) -> np.dtype:
    """A dtype that models can have, from its name or from a type of numpy or jax.

    Args:
      name: of the option, for the error.
      value: "float32", "bfloat16" or "float16", or their types; "float64" where jax computes in it.

    Raises:
      ValueError: it is another, or no dtype at all.
    """
    try:
        dtype = np.dtype(jnp.dtype(value)) if value is not None else None
    except (TypeError, ValueError):
        dtype = None
    if dtype is not None and str(dtype) in (*FLOAT_TYPES, str(jax.dtypes.canonicalize_dtype(np.float64))):
        return dtype
    given = shown(value) if isinstance(value, str) else str(dtype or value)[:60]
    more = " float64 needs jax_enable_x64." if dtype == np.float64 else ""
    raise ValueError(f"{name}={given}, expected one of {', '.join(FLOAT_TYPES)}.{more}")

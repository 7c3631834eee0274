"""Decide whether two runs are the same run, and name every difference."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def options_of_result(arguments: Any, *, with_layout: bool) -> dict[str, Any]:
    """Select the options that two runs must share to compute the same numbers, by name.

    Args:
      arguments: a dataclass whose fields say what they change (`easydel.options.option_field`).
      with_layout: whether the layout changes numbers too, as it does where dropout is drawn by position in the batch.
    """
    counts = ("result", "layout") if with_layout else ("result",)
    names = [field.name for field in dataclasses.fields(arguments) if field.metadata["changes"] in counts]
    values = dataclasses.asdict(arguments)
    return {name: values[name] for name in names}


def as_json(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return an identity as a checkpoint's metadata gives it back: tuples become lists, other objects text."""
    return json.loads(json.dumps(identity, default=str))


def refuse_other_run(checkpoint: Path, saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose identity differs from this run's.

    Args:
      checkpoint: its folder.
      saved: the checkpoint's identity.
      own: this run's, or those entries of it that are known; only these are compared.

    Raises:
      ValueError: names every difference.
    """
    differences = list(_differences({name: value for name, value in saved.items() if name in own}, own))
    if differences:
        shown = "\n  ".join(differences)
        raise ValueError(
            f"{checkpoint} is of another run:\n  {shown}\nGive this run the checkpoint's settings to resume from it, "
            "or start a new one without resume_from_checkpoint (load the trained weights as the model to build on)."
        )


def _differences(saved: Mapping[str, Any], own: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name in sorted(saved.keys() | own.keys()):
        then, now = saved.get(name, "nothing"), own.get(name, "nothing")
        if isinstance(then, dict) and isinstance(now, dict):
            yield from _differences(then, now, f"{prefix}{name}.")
        elif then != now:
            yield f"{prefix}{name}: the checkpoint has {then!r}, this run {now!r}"

"""What makes two runs the same run, and how to say that they are not."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def options_of_result(arguments: Any, *, with_layout: bool) -> dict[str, Any]:
    """The options that two runs must share to compute the same numbers, by name.

    Args:
      arguments: a dataclass whose fields say what they change (`easydel.options.option_field`).
      with_layout: whether the layout changes numbers too, as it does where dropout is drawn by position in the batch.
    """
    counts = ("result", "layout") if with_layout else ("result",)
    names = [field.name for field in dataclasses.fields(arguments) if field.metadata["changes"] in counts]
    values = dataclasses.asdict(arguments)
    return {name: values[name] for name in names}


def as_json(identity: Mapping[str, Any]) -> dict[str, Any]:
    """An identity as it comes back from a checkpoint's metadata: tuples are lists there, objects text."""
    return json.loads(json.dumps(identity, default=str))


def refuse_other_run(checkpoint: Path, saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise `ValueError` that names every difference between a checkpoint's run and what is known of this one."""
    differences = list(_differences({name: value for name, value in saved.items() if name in own}, own))
    if differences:
        shown = "\n  ".join(differences)
        raise ValueError(
            f"{checkpoint} is of another run:\n  {shown}\nGive this run the checkpoint's settings to go on with it, or "
            "start anew without resume_from_checkpoint (load the trained weights as the model to build on them)."
        )


def _differences(saved: Mapping[str, Any], own: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name in sorted(saved.keys() | own.keys()):
        then, now = saved.get(name, "nothing"), own.get(name, "nothing")
        if isinstance(then, dict) and isinstance(now, dict):
            yield from _differences(then, now, f"{prefix}{name}.")
        elif then != now:
            yield f"{prefix}{name}: the checkpoint has {then!r}, this run {now!r}"

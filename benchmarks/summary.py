"""From the measurements of runs to the few numbers that are compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

Run = Mapping[str, Any]
# Share of an update's seconds spent on compiling, or on reading a compiled program, from which it is a warm-up.
WARMS_UP = 0.01


@dataclasses.dataclass(frozen=True)
class Summary:
    """One contender over all rounds; each list has one entry a round.

    Attributes:
      seconds: of every steady update.
      pairs_per_second: over the steady updates of a round.
      peak_memory: bytes.
      first_update: seconds from the start of the process to the end of its first update.
      reference: seconds of scoring the reference before training; empty where it is scored in the updates.
      flops_per_second: useful arithmetic; empty where it is not known.
      padding: share of the places of a round's steady updates; empty where it is not known.
      compiling: seconds in a round's updates, from which the first and those that compiled are not steady.
      last_loss: before the last update.
    """

    seconds: list[float]
    pairs_per_second: list[float]
    peak_memory: list[int]
    first_update: list[float]
    reference: list[float]
    flops_per_second: list[float]
    padding: list[float]
    compiling: list[float]
    last_loss: float


def steady_updates(runs: Sequence[Run]) -> list[int]:
    """Numbers, from 0, of the updates that none of these runs warmed up in: not the first, none that got a program."""
    updates = min(len(run["updates"]) for run in runs)
    return [number for number in range(1, updates) if not any(_warms_up(run["updates"][number]) for run in runs)]


def _warms_up(update: Mapping[str, Any]) -> bool:
    return update.get("compilation", 0.0) > WARMS_UP * update["seconds"]


def summarise(runs: Sequence[Run], steady: Sequence[int], forward_flops: Sequence[float] = ()) -> Summary:
    """Summary of one contender's runs.

    Args:
      runs: one a round.
      steady: updates to count.
      forward_flops: of every update's forward pass.
    """
    rates, flops, padding = [], [], []
    for run in runs:
        spent = sum(run["updates"][number]["seconds"] for number in steady)
        rates.append(run["pairs"] * len(steady) / spent)
        if forward_flops:
            passes = 4 if run["scores_reference"] else 3
            flops.append(passes * sum(forward_flops[number] for number in steady) / spent)
        if "padded_tokens" in run["updates"][0]:
            tokens, places = (sum(run["updates"][n][key] for n in steady) for key in ("tokens", "padded_tokens"))
            padding.append(1 - tokens / places)
    return Summary(
        seconds=[run["updates"][number]["seconds"] for run in runs for number in steady],
        pairs_per_second=rates,
        peak_memory=[run["peak_memory"] for run in runs],
        first_update=[run["seconds"]["first update done"] for run in runs],
        reference=[run["seconds"][key] for run in runs for key in ("scoring the reference",) if key in run["seconds"]],
        flops_per_second=flops,
        padding=padding,
        compiling=[sum(update.get("compilation", 0.0) for update in run["updates"]) for run in runs],
        last_loss=runs[-1]["updates"][-1]["loss"],
    )


def spread(values: Sequence[float], digits: int) -> str:
    """The median, and the least and the most where there are several."""
    middle = f"{median(values):,.{digits}f}"
    if len(values) == 1:
        return middle
    return f"{middle} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Ours by theirs, round by round: what disturbs a round disturbs both."""
    return [a / b for a, b in zip(ours, theirs, strict=True)]

"""Whether contenders trained the same thing, undisturbed: speeds of different work say nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from benchmarks.measurement import was_held_up

TOLERANCE = 1e-3
# How often a trainer runs a pair's prompt. Others (EasyDeL 0.3.0 sees the same rows in the same order, but its losses
# leave ours by some hundredths after the first update) must only start from ln 2.
RUNS_OF_A_PROMPT = {"ours": 1, "trl": 2}


def failures(result: Mapping[str, Any]) -> list[str]:
    """The contenders of a result that did not come to their end."""
    return [f"{run['contender']} failed: {run['failure']}" for run in result["runs"] if "failure" in run]


def disagreements(result: Mapping[str, Any]) -> list[str]:
    """What is not as it must be in a result of the headline suite; empty where all is well.

    Before the first update policy and reference are one model, so its loss is ln 2. The later losses are those of the
    first contender that made updates of as many pairs, and every token was seen.
    """
    found: list[str] = []
    losses: dict[int, tuple[str, list[float]]] = {}
    for run in result["runs"]:
        if "failure" in run:
            continue
        name, updates = run["contender"], run["updates"]
        if abs(updates[0]["loss"] - math.log(2)) > TOLERANCE:
            found.append(f"{name}: the first loss is {updates[0]['loss']:.6f}, expected ln 2")
        if run["trainer"] not in RUNS_OF_A_PROMPT:
            continue
        first, expected = losses.setdefault(run["pairs"], (name, [update["loss"] for update in updates]))
        for number, (update, loss) in enumerate(zip(updates, expected)):
            if abs(update["loss"] - loss) > TOLERANCE:
                found.append(f"{name}: loss of update {number + 1} is {update['loss']:.6f}, {first} has {loss:.6f}")
        if run["pairs"] != result["pairs"]:
            continue
        for number, (update, (prompt, chosen, rejected)) in enumerate(zip(updates, result["tokens"])):
            tokens = RUNS_OF_A_PROMPT[run["trainer"]] * prompt + chosen + rejected
            if update["tokens"] != tokens:
                found.append(f"{name}: update {number + 1} ran {update['tokens']:.0f} tokens, expected {tokens}")
    return found


def hold_ups(result: Mapping[str, Any]) -> list[str]:
    """The updates of a result that were paused or disturbed, so that their seconds are not theirs."""
    return [
        f"{run['contender']}: update {number + 1} took {update['seconds']:.1f} s, in which it had the processor for "
        f"{update['processor_seconds']:.1f} s and others had it for {update['processor_seconds_of_others']:.1f} s; "
        "measure again on a machine that does nothing else"
        for run in result["runs"]
        for number, update in enumerate(run.get("updates", []))
        if was_held_up(update)
    ]

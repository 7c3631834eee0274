"""What scoring completion tokens only, and in chunks, brings: forward and backward pass of SmolLM2's head alone.

    python -m benchmarks.vocabulary

Writes results/vocabulary.json. Numbers of tokens are those of an update of 16 mixed pairs, rounded.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from benchmarks.suite import machine
from benchmarks.suite.measurement import Stopwatch, was_held_up
from easydel.ops.linear_log_probs import linear_log_probs

RESULTS = Path(__file__).parent / "results"
HIDDEN, VOCABULARY = 576, 49152
Scores = Callable[[Float[Array, "tokens hidden"], Float[Array, "vocab hidden"], Int[Array, " tokens"]], Array]


def in_chunks(hidden: Array, weight: Array, targets: Array, *, chunk_size: int) -> Array:
    """Ours."""
    return linear_log_probs(hidden[None], weight, targets[None], chunk_size=chunk_size)


def all_logits(hidden: Array, weight: Array, targets: Array) -> Array:
    """The plain way: all logits at once, kept for the backward pass."""
    logits = jax.nn.log_softmax(hidden @ weight.T, axis=-1)
    return jnp.take_along_axis(logits, targets[:, None], axis=-1)


def measure(name: str, scores: Scores, tokens: int, repeats: int) -> dict[str, Any]:
    """Seconds and temporary bytes of the sum of log-probs with its gradients."""
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (tokens, HIDDEN))
    weight = 0.05 * jax.random.normal(keys[1], (VOCABULARY, HIDDEN))
    targets = jax.random.randint(keys[2], (tokens,), 0, VOCABULARY)
    step = jax.jit(jax.grad(lambda h, w: jnp.sum(scores(h, w, targets)), argnums=(0, 1)))
    compiled = step.lower(hidden, weight).compile()
    laps = []
    for _ in range(repeats + 1):
        stopwatch = Stopwatch()
        jax.block_until_ready(compiled(hidden, weight))
        laps.append(stopwatch.lap())
    if any(map(was_held_up, laps[1:])):
        raise SystemExit(f"{name}: held up by other work; measure again on a machine that does nothing else.")
    temporary = compiled.memory_analysis().temp_size_in_bytes
    seconds = [lap["seconds"] for lap in laps[1:]]
    return {"name": name, "tokens": tokens, "seconds": seconds, "temporary_bytes": temporary}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--completion-tokens", type=int, default=6000)
    parser.add_argument("--tokens", type=int, default=16000, help="of both sides with their prompts and padding")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder")
    arguments = parser.parse_args()
    completions, everything, repeats = arguments.completion_tokens, arguments.tokens, arguments.repeats
    # The first is the library's own.
    ways: list[tuple[str, Scores, int]] = [
        (f"completions, chunks of {size}", functools.partial(in_chunks, chunk_size=size), completions)
        for size in (256, 128, 512, 1024, 2048)
    ]
    ways.append(("completions, all logits at once", all_logits, completions))
    ways.append(("every token, chunks of 256", functools.partial(in_chunks, chunk_size=256), everything))
    result: dict[str, Any] = {"machine": machine.describe(), "ways": []}
    for way in ways:
        result["ways"].append(measure(*way, repeats))
        print(f"{way[0]}: {min(result['ways'][-1]['seconds']):.2f} s", flush=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "vocabulary.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

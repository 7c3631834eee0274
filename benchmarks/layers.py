"""What the forms of the layers cost: forward and backward pass of SmolLM2-135M's layers alone on one part of an update.

    python -m benchmarks.layers

Writes results/layers.json. The ways take turns, so that what disturbs one disturbs all.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from benchmarks.suite import machine
from benchmarks.suite.measurement import Stopwatch, was_held_up
from benchmarks.suite.rows import DATA, SETS, choose
from easydel import AutoEasyDeLModelForCausalLM, load_tokenizer
from easydel.data import PreferenceTransform
from easydel.data.batching.packing import PackingLayout, pack
from easydel.layers.decoder_layer import DecoderLayer
from easydel.modules import decoder
from easydel.ops.attention import xla as tree_attention_xla
from easydel.ops.attention.inputs import TokenIds
from easydel.weights.download import smollm2_135m_instruct

RESULTS = Path(__file__).parent / "results"
SCAN = jax.lax.scan


def unrolled_over_layers(step: Any, carry: Any, inputs: Any, **options: Any) -> Any:
    """`jax.lax.scan` that has no loop where it goes over the layers of a model."""
    is_over_layers = any(isinstance(x, DecoderLayer) for x in (inputs if isinstance(inputs, tuple) else (inputs,)))
    return SCAN(step, carry, inputs, **options, unroll=True if is_over_layers else 1)


@contextlib.contextmanager
def block_of(size: int) -> Iterator[None]:
    """Attention's tiles have this many queries and keys."""
    with mock.patch.object(tree_attention_xla, "BLOCK", size):
        yield


# Name -> what is changed while the way is compiled, and whether layers are rebuilt.
WAYS = {
    "a loop over layers, attention's result kept, tiles of 64": (contextlib.nullcontext, True),
    "all products kept": (contextlib.nullcontext, False),
    "attention computed again": (lambda: mock.patch.object(decoder, "keep_attention", None), True),
    "layers one after the other without a loop": (lambda: mock.patch("jax.lax.scan", unrolled_over_layers), True),
    "tiles of 32": (functools.partial(block_of, 32), True),
    "tiles of 128": (functools.partial(block_of, 128), True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the rows' files")
    parser.add_argument("--tokens", type=int, default=2048, help="of the part")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder")
    arguments = parser.parse_args()
    folder = smollm2_135m_instruct()
    tokenizer, model = load_tokenizer(folder), AutoEasyDeLModelForCausalLM.from_pretrained(folder)
    rows, _ = choose([arguments.data / file for file in SETS["mixed"]], 16, tokenizer, 1024)
    transform = PreferenceTransform(tokenizer, max_length=1024, max_prompt_length=None)
    pairs = [
        transform({"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected}, number)
        for number, row in enumerate(rows)
    ]
    batch = {
        name: value[:1] for name, value in pack(pairs, PackingLayout(0, micro_batch_tokens=arguments.tokens)).items()
    }
    input_ids = jnp.asarray(batch["input_ids"])
    ids = TokenIds(*(jnp.asarray(batch[name]) for name in ("segment_ids", "branch_ids", "position_ids")))

    programs = {}
    for name, (changed, remat) in WAYS.items():
        jax.clear_caches()

        def size(model: Any, remat: bool = remat) -> jax.Array:
            return jnp.sum(jnp.square(model.hidden_states(input_ids, ids, remat=remat).hidden))

        with changed():
            stopwatch = Stopwatch()
            programs[name] = jax.jit(jax.grad(size)).lower(model).compile()
            print(f"{name}: compiled in {stopwatch.lap()['seconds']:.0f} s", flush=True)
    laps: dict[str, list[dict[str, float]]] = {name: [] for name in programs}
    for _ in range(arguments.repeats + 1):
        for name, program in programs.items():
            stopwatch = Stopwatch()
            jax.block_until_ready(program(model))
            laps[name].append(stopwatch.lap())
    if held_up := [name for name in laps if any(map(was_held_up, laps[name][1:]))]:
        raise SystemExit(
            f"held up by other work: {', '.join(held_up)}; measure again on a machine that does nothing else."
        )
    result = {
        "machine": machine.describe(),
        "ways": [
            {
                "name": name,
                "tokens": int((batch["segment_ids"] > 0).sum()),
                "seconds": [lap["seconds"] for lap in laps[name][1:]],
                "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
            }
            for name, program in programs.items()
        ],
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "layers.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Run by gpu.py in a process of its own, so that the peak of memory is this variant's: one JSON object as last line."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.accelerator.kernel_shares import kernel_shares
from benchmarks.accelerator.shapes import LEARNING_RATE, SHAPES, made_pairs
from benchmarks.accelerator.variants import VARIANTS, Variant
from easydel import DPOConfig
from easydel.data.batching.packing import PackingLayout, pack
from easydel.infra.base_state import EasyDeLState
from easydel.infra.mesh import create_mesh, put_batch
from easydel.modules.qwen2 import Qwen2ForCausalLM
from easydel.trainers.direct_preference_optimization_trainer.objectives.objective import Objective
from easydel.trainers.direct_preference_optimization_trainer.scoring import ScoringOptions, score_in_micro_batches
from easydel.trainers.direct_preference_optimization_trainer.steps import training_step

TRACED_UPDATES = 2


def measure(shape_name: str, variant: Variant, pair_count: int, updates: int, is_traced: bool) -> dict[str, Any]:
    """Time, memory, losses and, if asked for, kernel shares of updates on one batch."""
    shape = SHAPES[shape_name]
    pairs = made_pairs(shape, pair_count)
    layout = PackingLayout(
        0, packing=variant.packing, share_prompt=variant.share_prompt, micro_batch_tokens=variant.micro_batch_tokens
    )
    packed = pack(pairs, layout)
    del packed["pair_keys"]
    mesh = create_mesh((1, 1, 1, 1, 1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        config = Qwen2ForCausalLM.read_config(shape.config)
        model = Qwen2ForCausalLM.init(config, jax.random.key(0), jnp.bfloat16).shard(mesh)
        model = dataclasses.replace(model, attention_backend=variant.attention_backend)
        head = 2 * config.vocab_size * config.hidden_size
        flops_per_token, training_flops_per_token = model.flops_per_token, model.training_flops_per_token
        batch = put_batch(packed, mesh)
        reference = jax.tree.map(jnp.copy, model)
        state = EasyDeLState.create(model, optax.adamw(LEARNING_RATE))
        del model

        started = time.perf_counter()
        score = jax.jit(
            lambda model, batch: score_in_micro_batches(model, batch, ScoringOptions(), layout.count_micro_batches)
        ).lower(reference, batch)
        score = score.compile()
        logps = score(reference, batch)
        known = {"ref_chosen_logps": logps.chosen, "ref_rejected_logps": logps.rejected}
        if variant.known_reference:
            del reference
        step = functools.partial(
            training_step,
            objective=Objective.of(DPOConfig()),
            scoring=ScoringOptions(),
            count_micro_batches=layout.count_micro_batches,
            remat=variant.checkpointing,
        )
        step = jax.jit(step, donate_argnums=0).lower(state, batch | known).compile()
        compile_seconds = time.perf_counter() - started

        def update(state: EasyDeLState) -> tuple[EasyDeLState, dict[str, jax.Array]]:
            if variant.known_reference:
                return step(state, batch | known)
            logps = score(reference, batch)
            return step(state, batch | {"ref_chosen_logps": logps.chosen, "ref_rejected_logps": logps.rejected})

        state, first = update(state)
        losses = [float(first["loss"])]
        started, pending = time.perf_counter(), []
        for _ in range(updates):
            state, metrics = update(state)
            pending.append(metrics["loss"])
        losses += [float(loss) for loss in jax.device_get(pending)]
        seconds = (time.perf_counter() - started) / updates

        shares = None
        if is_traced:
            with tempfile.TemporaryDirectory() as folder:
                with jax.profiler.trace(folder):
                    for _ in range(TRACED_UPDATES):
                        state, metrics = update(state)
                    jax.block_until_ready(metrics)
                shares = kernel_shares(Path(folder))

    tokens_in_rows = np.count_nonzero(packed["segment_ids"])
    tokens = sum(pair.prompt_ids.size + pair.chosen_ids.size + pair.rejected_ids.size for pair in pairs)
    scored = sum(pair.chosen_ids.size + pair.rejected_ids.size for pair in pairs)
    # What an update cannot do without, whatever the layout: every prompt once, no padding, nothing rebuilt.
    flops = tokens * training_flops_per_token + 3 * scored * head
    if not variant.known_reference:
        flops += tokens * flops_per_token + scored * head
    analysis = step.memory_analysis()
    statistics = jax.devices()[0].memory_stats() or {}
    return {
        "device": jax.devices()[0].device_kind,
        "variant": dataclasses.asdict(variant),
        "rows": [layout.positions_in_use(packed) // packed["input_ids"].shape[1], packed["input_ids"].shape[1]],
        "padding_fraction": 1 - tokens_in_rows / layout.positions_in_use(packed),
        "pairs": pair_count,
        "useful_tokens": tokens,
        "useful_flops": float(flops),
        "compile_seconds": compile_seconds,
        "seconds": seconds,
        "losses": losses,
        "peak_bytes": statistics.get("peak_bytes_in_use"),
        "planned_bytes": analysis.argument_size_in_bytes + analysis.temp_size_in_bytes,
        "kernel_shares": shares,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--variant", choices=VARIANTS, required=True)
    parser.add_argument("--pairs", type=int, required=True)
    parser.add_argument("--updates", type=int, required=True)
    parser.add_argument("--trace", action="store_true")
    arguments = parser.parse_args()
    variant = VARIANTS[arguments.variant]
    print(json.dumps(measure(arguments.shape, variant, arguments.pairs, arguments.updates, arguments.trace)))


if __name__ == "__main__":
    main()

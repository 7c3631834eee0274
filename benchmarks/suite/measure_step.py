"""One update of a small random model on made rows: its time, its memory, and what both should be.

python -m benchmarks.suite.measure_step --length 512 --batch 4 --vocabulary 32768 --prompt-share 0.5
"""

from __future__ import annotations

import argparse
import contextlib
import json
from typing import Any

import jax
import numpy as np
from datasets import Dataset

from benchmarks.suite.arithmetic import update_bytes, update_flops
from benchmarks.suite.made import made_row, small_model, tokenizer_of_ids
from benchmarks.suite.measurement import Stopwatch, forget_peak_memory, held_memory, peak_memory, was_held_up
from easydel import DPOConfig, DPOTrainer
from easydel.data.batching.packing import PackingLayout
from easydel.infra.mesh import put_batch


def measure(length: int, batch: int, vocabulary: int, prompt_share: float, updates: int) -> dict[str, Any]:
    """Seconds of each update after the first, bytes by compiler and by kernel, FLOPs and bytes due."""
    random = np.random.default_rng(0)
    rows = [made_row(random, length, prompt_share, vocabulary) for _ in range(batch)]
    model = small_model(vocabulary, length)
    trainer = DPOTrainer(
        DPOConfig(
            total_batch_size=batch,
            max_length=None,
            max_prompt_length=None,
            shuffle_train_dataset=False,
            save_directory=None,
            progress_bar=False,
        ),
        model,
        None,
        tokenizer_of_ids(vocabulary),
        Dataset.from_list(rows),
    )
    with contextlib.closing(trainer.dataloaders.train.iterate()) as batches, jax.set_mesh(trainer.mesh):
        on_host = next(batches)
        on_device = trainer.prepare_batch(trainer.state, on_host, put_batch(on_host, trainer.mesh))
        state = trainer.state
        compiled = jax.jit(trainer.make_steps()[0], donate_argnums=0).lower(state, on_device).compile()
        memory = compiled.memory_analysis()
        laps = []
        held = held_memory()
        forget_peak_memory()
        for _ in range(updates + 1):
            stopwatch = Stopwatch()
            state, _ = jax.block_until_ready(compiled(state, on_device))
            laps.append(stopwatch.lap())
    return {
        "seconds": [lap["seconds"] for lap in laps[1:]],
        "was_held_up": any(map(was_held_up, laps[1:])),
        "compiled_bytes": memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes,
        # The arguments were held before.
        "measured_bytes": peak_memory() - held + memory.argument_size_in_bytes,
        "flops": update_flops(model.config, on_host, scores_reference=False),
        "bytes": update_bytes(model.config, on_host, PackingLayout(padding_value=0)),
        "tokens": int(np.count_nonzero(on_host["segment_ids"])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=512, help="tokens of prompt and one completion")
    parser.add_argument("--batch", type=int, default=4, help="pairs")
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--prompt-share", type=float, default=0.5, help="of the length")
    parser.add_argument("--updates", type=int, default=3)
    print(json.dumps(measure(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()

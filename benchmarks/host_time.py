"""Milliseconds of an update that the host adds to the device's, on a model so small that the host would be seen.

`train()`'s seconds an update beside those of the bare compiled step on the same batch.

    python -m benchmarks.host_time
"""

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from typing import Any
from unittest import mock

import jax
import numpy as np
from datasets import Dataset

from benchmarks.made import Shape, made_row, random_model, tokenizer_of_ids
from easydel import DPOConfig, DPOTrainer, TrainerCallback
from easydel.data.batching.loader import BatchIterator

VOCABULARY = 512
WARM_UP = 20  # updates that compile, or find the caches of the processor cold


def rows_of(pairs: int) -> Dataset:
    """Pairs of one length, so that every batch has the same shape."""
    random = np.random.default_rng(0)
    return Dataset.from_list([made_row(random, 64, 0.5, VOCABULARY) for _ in range(pairs)])


class Waits:
    """Seconds that the loop waited for each batch; data that is prepared in time costs next to nothing here."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def watch(self) -> contextlib.AbstractContextManager:
        original = BatchIterator.__next__

        def timed(batches: BatchIterator) -> Any:
            started = time.perf_counter()
            try:
                return original(batches)
            finally:
                self.seconds.append(time.perf_counter() - started)

        return mock.patch.object(BatchIterator, "__next__", timed)


class Clock(TrainerCallback):
    """When each update was sent off."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, trainer: DPOTrainer, step: int) -> None:
        self.times.append(time.perf_counter())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=8, help="of one update")
    parser.add_argument("--log-steps", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        config = DPOConfig(
            total_batch_size=arguments.pairs,
            precompute_ref_log_probs=True,
            log_steps=arguments.log_steps,
            save_directory=folder,
            progress_bar=True,
        )
        clock = Clock()
        rows = rows_of(arguments.pairs * (arguments.updates + WARM_UP))
        trainer = DPOTrainer(
            config,
            random_model(Shape(width=128, vocabulary=VOCABULARY)),
            None,
            tokenizer_of_ids(VOCABULARY),
            rows,
            callbacks=[clock],
        )
        seen: dict[str, dict] = {}
        prepare = trainer.prepare_batch

        def keep(state, batch, device_batch):
            seen["batch"] = prepare(state, batch, device_batch)
            return seen["batch"]

        trainer.prepare_batch = keep  # type: ignore[method-assign]
        waits = Waits()
        with waits.watch():
            state = trainer.train().state
        whole = (clock.times[-1] - clock.times[WARM_UP - 1]) / (len(clock.times) - WARM_UP)
        step, batch = trainer.functions.sharded_training_step_function, seen["batch"]
        with jax.set_mesh(trainer.mesh):
            for number in range(arguments.updates + WARM_UP):
                if number == WARM_UP:
                    jax.block_until_ready(state)
                    started = time.perf_counter()
                state, _ = step(state, batch)
            jax.block_until_ready(state)
        bare = (time.perf_counter() - started) / arguments.updates
    print(f"{arguments.updates} updates of {arguments.pairs} pairs, a line of the log every {arguments.log_steps}")
    print(f"train()                 {1e3 * whole:7.2f} ms an update")
    print(f"the compiled step alone {1e3 * bare:7.2f} ms")
    print(f"the host adds           {1e3 * (whole - bare):7.2f} ms")
    print(f"waiting for a batch     {1e3 * statistics.median(waits.seconds[WARM_UP:]):7.2f} ms, the median")


if __name__ == "__main__":
    main()

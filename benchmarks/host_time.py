"""Milliseconds of an update that the host adds to the device's, on a model so small that the host would be seen.

`train()`'s seconds an update beside those of the bare compiled step on the same batch.

    python benchmarks/host_time.py
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
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from easydel import DPOConfig, DPOTrainer, LlamaForCausalLM, TrainerCallback
from easydel.data.loader import BatchIterator
from easydel.infra.base_config import EasyDeLBaseConfig

VOCABULARY = 512
WARM_UP = 20  # updates that compile, or find the caches of the processor cold


def tiny_model() -> LlamaForCausalLM:
    config = EasyDeLBaseConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        rope_scaling=None,
        tie_word_embeddings=True,
        layer_windows=(None,) * 4,
        max_position_embeddings=512,
        initializer_range=0.02,
    )
    return LlamaForCausalLM.init(config, jax.random.key(0))


def tokenizer() -> PreTrainedTokenizerFast:
    """One that is only asked how many ids there are: the rows are token ids already."""
    words = {str(number): number for number in range(VOCABULARY)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="0")), pad_token="0", eos_token="1"
    )


def rows_of(pairs: int) -> Dataset:
    """Pairs of one length, so that every batch has the same shape."""
    rng = np.random.default_rng(0)
    draw = lambda size: rng.integers(2, VOCABULARY, size).tolist()  # noqa: E731
    return Dataset.from_list(
        [{"prompt": draw(32), "chosen": [*draw(31), 1], "rejected": [*draw(31), 1]} for _ in range(pairs)]
    )


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
        trainer = DPOTrainer(config, tiny_model(), None, tokenizer(), rows, callbacks=[clock])
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

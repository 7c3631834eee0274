"""Our DPOTrainer on plain-text rows, measured.

A reference that is scored online needs an empty cache (XDG_CACHE_HOME), or its log-probs are found there.
"""

from __future__ import annotations

import json
import time
from importlib.metadata import version
from typing import Any

from benchmarks.measurement import Measurement, arguments_of_a_contender, watch_compilation


def main() -> None:
    arguments = arguments_of_a_contender(__doc__).parse_args()
    measurement = Measurement()

    import jax
    from datasets import Dataset

    from benchmarks.arithmetic import forward_flops
    from easydel import AutoEasyDeLModelForCausalLM, DPOConfig, DPOTrainer, load_tokenizer
    from easydel.trainers import TrainerCallback

    measurement.mark("imports done")
    compilations = watch_compilation()

    class MeasuredTrainer(DPOTrainer):
        """DPOTrainer that counts the arithmetic of its batches and the time its reference takes before training."""

        flops = 0.0

        def batch_statistics(self, batch: Any) -> Any:
            self.flops = forward_flops(self.model.config, batch)
            return super().batch_statistics(batch)

        def prepare_run(self) -> None:
            started = time.perf_counter()
            super().prepare_run()
            if self.arguments.precompute_ref_log_probs:
                measurement.seconds["scoring the reference"] = time.perf_counter() - started

    class Clock(TrainerCallback):
        def on_train_begin(self, trainer: Any) -> None:
            measurement.mark("training begun")
            measurement.begin_updates()

        def on_step_end(self, trainer: Any, step: int) -> None:
            jax.block_until_ready(trainer.state)
            measurement.end_update(forward_flops=trainer.flops, compilation=sum(compilations))
            compilations.clear()

    tokenizer = load_tokenizer(arguments.model)
    measurement.mark("tokenizer loaded")
    model = AutoEasyDeLModelForCausalLM.from_pretrained(arguments.model)
    measurement.mark("model loaded")
    rows = [json.loads(line) for line in arguments.rows.read_text().splitlines()]
    options = {
        "total_batch_size": arguments.pairs,
        "max_training_steps": arguments.updates,
        "max_length": arguments.max_length,
        "max_prompt_length": None,
        "learning_rate": arguments.learning_rate,
        "scheduler": "constant",
        "beta": arguments.beta,
        "shuffle_train_dataset": False,
        "save_directory": None,
        "progress_bar": False,
    }
    trainer = MeasuredTrainer(
        DPOConfig(**(options | arguments.options)),
        model,
        None,
        tokenizer,
        Dataset.from_list(rows[: arguments.pairs * arguments.updates]),
        callbacks=[Clock()],
    )
    # The trainer alone holds it now, and can let go of it once its log-probs are known.
    del model
    measurement.mark("trainer built")
    log = trainer.train().log_history
    for update, line in zip(measurement.updates, log, strict=True):
        update["loss"] = line["train/loss"]
        update["tokens"] = line["train/num_tokens"]
        update["padded_tokens"] = line["train/num_tokens"] / (1 - line["train/padding_fraction"])
    on_device = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    about = {"device": jax.devices()[0].device_kind, "versions": {name: version(name) for name in ("jax", "jaxlib")}}
    measurement.write(arguments.output, **about, **({} if on_device is None else {"peak_memory": on_device}))


if __name__ == "__main__":
    main()

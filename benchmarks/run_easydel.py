"""The DPOTrainer of EasyDeL 0.3.0 on plain-text rows, measured.

Run by an interpreter that has ``easydel==0.3.0 torch pillow``: it loads safetensors by way of torch.
"""

from __future__ import annotations

import json
import tempfile
from importlib.metadata import version
from typing import Any

# A sibling by its own name: the repository must not be on this interpreter's path.
from measurement import Measurement, arguments_of_a_contender, watch_compilation


def main() -> None:
    arguments = arguments_of_a_contender(__doc__).parse_args()
    measurement = Measurement()

    import jax.numpy as jnp
    from datasets import Dataset
    from transformers import AutoTokenizer

    import easydel
    from easydel.trainers import DPOConfig, DPOTrainer

    measurement.mark("imports done")

    compilations = watch_compilation()

    class MeasuredTrainer(DPOTrainer):
        """DPOTrainer with a clock; it waits for the device before this hook itself."""

        def on_step_end(self, state: Any, metrics: Any, step: int) -> Any:
            measurement.end_update(loss=float(metrics.loss), compilation=sum(compilations))
            compilations.clear()
            return super().on_step_end(state, metrics, step)

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = easydel.AutoEasyDeLModelForCausalLM.from_pretrained(
        str(arguments.model), dtype=jnp.float32, param_dtype=jnp.float32
    )
    measurement.mark("model loaded")
    rows = [json.loads(line) for line in arguments.rows.read_text().splitlines()]
    rows = rows[: arguments.pairs * arguments.updates]
    # It puts a stop token behind every completion itself.
    rows = [
        row | {side: row[side].removesuffix(tokenizer.eos_token) for side in ("chosen", "rejected")} for row in rows
    ]

    def longest(*fields: str) -> int:
        return max(len(tokenizer(row[field])["input_ids"]) for row in rows for field in fields)

    # Every pair is padded to these, so they are no longer than the rows need.
    prompt, completion = longest("prompt"), longest("chosen", "rejected") + 1
    with tempfile.TemporaryDirectory() as scratch:
        trainer = MeasuredTrainer(
            arguments=DPOConfig(
                save_directory=scratch,
                do_last_save=False,
                total_batch_size=arguments.pairs,
                max_training_steps=arguments.updates,
                num_train_epochs=1,
                max_length=prompt + completion,
                max_prompt_length=prompt,
                max_completion_length=completion,
                learning_rate=arguments.learning_rate,
                scheduler="none",
                weight_decay=0.01,
                clip_grad=1.0,
                beta=arguments.beta,
                shuffle_train_dataset=False,
                use_wandb=False,
                progress_bar_type="json",
                log_steps=1,
                **arguments.options,
            ),
            model=model,
            processing_class=tokenizer,
            train_dataset=Dataset.from_list(rows),
        )
        measurement.mark("trainer built")
        measurement.begin_updates()
        trainer.train()
    measurement.write(arguments.output, versions={name: version(name) for name in ("easydel", "jax")})


if __name__ == "__main__":
    main()

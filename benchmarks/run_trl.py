"""TRL's own DPOTrainer on plain-text rows, measured. Run by an interpreter that has `golden/requirements.txt`."""

from __future__ import annotations

import json
import tempfile
import time
from importlib.metadata import version
from typing import Any

# A sibling by its own name: the repository must not be on this interpreter's path.
from measurement import Measurement, arguments_of_a_contender


def main() -> None:
    arguments = arguments_of_a_contender(__doc__).parse_args()
    measurement = Measurement()

    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    measurement.mark("imports done")

    class MeasuredTrainer(DPOTrainer):
        """DPOTrainer that counts tokens and keeps its losses at full precision."""

        def __init__(self, **options: Any) -> None:
            self.losses: list[float] = []
            self.tokens = self.padded_tokens = 0
            super().__init__(**options)

        def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
            loss = super()._compute_loss(model, inputs, return_outputs)
            self.losses.append(float(loss[0] if return_outputs else loss))
            self.tokens += int(inputs["attention_mask"].sum())
            self.padded_tokens += inputs["input_ids"].numel()
            return loss

        def _precompute_ref_logps(self, *positional: Any, **named: Any) -> Any:
            started = time.perf_counter()
            dataset = super()._precompute_ref_logps(*positional, **named)
            measurement.seconds["scoring the reference"] = time.perf_counter() - started
            return dataset

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            measurement.begin_updates()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            losses, trainer.losses = trainer.losses, []
            measurement.end_update(
                loss=sum(losses) / len(losses), tokens=trainer.tokens, padded_tokens=trainer.padded_tokens
            )
            trainer.tokens = trainer.padded_tokens = 0

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    # Where the pad token is the stop token, torch gives its embedding no gradient. That is no part of the objective,
    # and losses could not be compared.
    model.get_input_embeddings().padding_idx = None
    measurement.mark("model loaded")
    rows = [json.loads(line) for line in arguments.rows.read_text().splitlines()]
    options = {"per_device_train_batch_size": min(8, arguments.pairs)} | arguments.options
    with tempfile.TemporaryDirectory() as scratch:
        trainer = MeasuredTrainer(
            model=model,
            processing_class=tokenizer,
            train_dataset=Dataset.from_list(rows[: arguments.pairs * arguments.updates]),
            callbacks=[Clock()],
            args=DPOConfig(
                output_dir=scratch,
                gradient_accumulation_steps=arguments.pairs // options["per_device_train_batch_size"],
                max_length=arguments.max_length,
                max_steps=arguments.updates,
                learning_rate=arguments.learning_rate,
                lr_scheduler_type="constant",
                beta=arguments.beta,
                weight_decay=0.01,
                train_sampling_strategy="sequential",
                bf16=arguments.platform != "cpu",
                use_cpu=arguments.platform == "cpu",
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                **options,
            ),
        )
        measurement.mark("trainer built")
        trainer.train()
    measurement.write(
        arguments.output,
        versions={name: version(name) for name in ("trl", "torch", "transformers")},
    )


if __name__ == "__main__":
    main()

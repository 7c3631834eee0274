"""TRL's DPOTrainer on pairs of token ids, with its own defaults: run by gpu.py under another interpreter.

    python benchmarks/accelerator/run_trl.py request.json

The request holds the model's config, the pairs and the number of updates. Weights are float32 and computed with in
bfloat16 where there is a GPU (TRL's default), as ours are; the last line printed is one JSON object.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, TrainerCallback


class TrainerOfIds(trl.DPOTrainer):
    """Takes rows that are token ids already."""

    def _prepare_dataset(self, dataset: Dataset, *_args: object, **_options: object) -> Dataset:
        return dataset


class Clock(TrainerCallback):
    """When each update ended, on a device that has nothing left to do."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_args: object, **_options: object) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    config = {key: value for key, value in request["config"].items() if key != "model_type"}
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**config))
    backend = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    clock, pairs = Clock(), request["pairs"]
    with tempfile.TemporaryDirectory() as folder:
        arguments = trl.DPOConfig(
            output_dir=folder,
            per_device_train_batch_size=request["micro_batch"],
            gradient_accumulation_steps=len(pairs) // request["micro_batch"],
            max_steps=request["updates"] + 1,
            learning_rate=request["learning_rate"],
            max_length=None,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            bf16=torch.cuda.is_available(),
        )
        trainer = TrainerOfIds(
            model=model,
            ref_model=copy.deepcopy(model),  # else TRL loads the reference by a name, which this model has not
            args=arguments,
            train_dataset=Dataset.from_list(pairs),
            processing_class=tokenizer,
            callbacks=[clock],
        )
        trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    result = {
        "versions": {module.__name__: module.__version__ for module in (trl, transformers, torch)},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "micro_batch": request["micro_batch"],
        # The first update warms up.
        "seconds": (clock.ends[-1] - clock.ends[0]) / request["updates"],
        "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        "losses": losses,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

"""A run of nine updates that kills itself when asked; the test runs it as a program.

usage: interrupted_run.py FOLDER {whole,kill,resume,sigterm,sigint} [option=value ...]
"""

from __future__ import annotations

import json
import os
import signal
import sys

import jax
from datasets import Dataset

from easydel import DPOConfig, DPOTrainer
from easydel.modules.llama import LlamaForCausalLM
from easydel.trainers.callbacks.callback import TrainerCallback
from tests.tiny import make_rows, make_tokenizer, tiny_config


class SendSignal(TrainerCallback):
    """Sends this process a signal after update 5, between two checkpoints."""

    def __init__(self, number: signal.Signals):
        self.number = number

    def on_step_end(self, trainer, step):
        if step == 5:
            if self.number is signal.SIGKILL:
                trainer.functions.checkpoint_manager.wait()  # a checkpoint half-written is another test's business
            os.kill(os.getpid(), self.number)


def main(folder: str, mode: str, *options: str) -> None:
    signals = {"kill": signal.SIGKILL, "sigterm": signal.SIGTERM, "sigint": signal.SIGINT}
    given = {name: json.loads(value) for name, value in (option.split("=", 1) for option in options)}
    config = DPOConfig(
        **{
            "save_directory": folder,
            "model_name": "run",
            "total_batch_size": 4,
            "num_train_epochs": 3,
            "max_training_steps": 9,
            "learning_rate": 1e-2,
            "save_steps": 2,
            "save_total_limit": 1,
            "progress_bar": False,
            "resume_from_checkpoint": "latest" if mode == "resume" else None,
            **given,
        }
    )
    trainer = DPOTrainer(
        config,
        LlamaForCausalLM.init(tiny_config(), jax.random.key(0)),
        None,
        make_tokenizer(),
        Dataset.from_list(make_rows()),
        Dataset.from_list(make_rows()[:3]),
        callbacks=[SendSignal(signals[mode])] if mode in signals else [],
    )
    trainer.train()


if __name__ == "__main__":
    main(*sys.argv[1:])

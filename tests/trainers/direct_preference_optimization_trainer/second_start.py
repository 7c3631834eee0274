"""A short run with an evaluation and a checkpoint; prints what it compiled. Run by test_second_start.py as a program.

usage: second_start.py FOLDER [option=value ...]
"""

from __future__ import annotations

import collections
import json
import sys

import jax
from datasets import Dataset

from easydel import DPOConfig, DPOTrainer
from easydel.modules.llama import LlamaForCausalLM
from tests.tiny import make_rows, make_tokenizer, tiny_config

REQUESTED, FOUND = "/jax/compilation_cache/compile_requests_use_cache", "/jax/compilation_cache/cache_hits"
COMPILED = "/jax/core/compile/backend_compile_duration"


def main(folder: str, *options: str) -> None:
    config = DPOConfig(
        **{
            "save_directory": folder,
            "total_batch_size": 4,
            "evaluation_steps": 2,
            "save_steps": 2,
            "progress_bar": False,
        }
        | {name: json.loads(value) for name, value in (option.split("=", 1) for option in options)}
    )
    model, rows = LlamaForCausalLM.init(tiny_config(), jax.random.key(0)), make_rows()
    counts: collections.Counter[str] = collections.Counter()
    jax.monitoring.register_event_listener(lambda event, **_: counts.update([event]))
    jax.monitoring.register_event_duration_secs_listener(lambda event, seconds, **_: counts.update([event]))
    DPOTrainer(config, model, None, make_tokenizer(), Dataset.from_list(rows), Dataset.from_list(rows[:3])).train()
    print(json.dumps({"requested": counts[REQUESTED], "found": counts[FOUND], "all": counts[COMPILED]}))


if __name__ == "__main__":
    main(*sys.argv[1:])

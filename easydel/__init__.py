"""EasyDeL DPO: preference optimisation of language models in JAX.

The public names load on first use, so that ``import easydel`` is quick and starts no JAX backend.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_TRAINER = "easydel.trainers.direct_preference_optimization_trainer"
_PUBLIC = {
    "AutoEasyDeLModelForCausalLM": "easydel.modules.auto",
    "DPOConfig": f"{_TRAINER}.dpo_config",
    "DPOTrainer": f"{_TRAINER}.dpo_trainer",
    "EasyDeLBaseConfig": "easydel.infra.base_config",
    "EasyDeLBaseModule": "easydel.infra.base_module",
    "EasyDeLState": "easydel.infra.base_state",
    "LlamaForCausalLM": "easydel.modules.llama",
    "MistralForCausalLM": "easydel.modules.mistral",
    "Qwen2ForCausalLM": "easydel.modules.qwen2",
    "Qwen3ForCausalLM": "easydel.modules.qwen3",
    "ShardedDataSource": "easydel.data.sources.base",
    "Trainer": "easydel.trainers.trainer",
    "TrainerCallback": "easydel.trainers.callbacks.callback",
    "TrainingArguments": "easydel.trainers.training_arguments",
    "load_tokenizer": "easydel.tokenizer.tokenizer",
    "open_source": "easydel.data.sources.open_source",
}
__all__ = [
    "AutoEasyDeLModelForCausalLM",
    "DPOConfig",
    "DPOTrainer",
    "EasyDeLBaseConfig",
    "EasyDeLBaseModule",
    "EasyDeLState",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "ShardedDataSource",
    "Trainer",
    "TrainerCallback",
    "TrainingArguments",
    "load_tokenizer",
    "open_source",
]

if TYPE_CHECKING:
    from easydel.data.sources.base import ShardedDataSource
    from easydel.data.sources.open_source import open_source
    from easydel.infra.base_config import EasyDeLBaseConfig
    from easydel.infra.base_module import EasyDeLBaseModule
    from easydel.infra.base_state import EasyDeLState
    from easydel.modules.auto import AutoEasyDeLModelForCausalLM
    from easydel.modules.llama import LlamaForCausalLM
    from easydel.modules.mistral import MistralForCausalLM
    from easydel.modules.qwen2 import Qwen2ForCausalLM
    from easydel.modules.qwen3 import Qwen3ForCausalLM
    from easydel.tokenizer.tokenizer import load_tokenizer
    from easydel.trainers.callbacks.callback import TrainerCallback
    from easydel.trainers.direct_preference_optimization_trainer.dpo_config import DPOConfig
    from easydel.trainers.direct_preference_optimization_trainer.dpo_trainer import DPOTrainer
    from easydel.trainers.trainer import Trainer
    from easydel.trainers.training_arguments import TrainingArguments


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'easydel' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])

"""Export the trainers and their options; each name loads on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_DPO = "easydel.trainers.direct_preference_optimization_trainer"
_PUBLIC = {
    "DPOConfig": f"{_DPO}.dpo_config",
    "DPOTrainer": f"{_DPO}.dpo_trainer",
    "Trainer": "easydel.trainers.trainer",
    "TrainerCallback": "easydel.trainers.callbacks.callback",
    "TrainerOutput": "easydel.trainers.trainer_protocol",
    "TrainingArguments": "easydel.trainers.training_arguments",
}
__all__ = [
    "DPOConfig",
    "DPOTrainer",
    "Trainer",
    "TrainerCallback",
    "TrainerOutput",
    "TrainingArguments",
]

if TYPE_CHECKING:
    from easydel.trainers.callbacks.callback import TrainerCallback
    from easydel.trainers.direct_preference_optimization_trainer.dpo_config import DPOConfig
    from easydel.trainers.direct_preference_optimization_trainer.dpo_trainer import DPOTrainer
    from easydel.trainers.trainer import Trainer
    from easydel.trainers.trainer_protocol import TrainerOutput
    from easydel.trainers.training_arguments import TrainingArguments


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'easydel.trainers' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])

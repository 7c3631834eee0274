"""Training loops and their options."""

from easydel.trainers.callbacks import TrainerCallback
from easydel.trainers.direct_preference_optimization_trainer.dpo_config import DPOConfig
from easydel.trainers.direct_preference_optimization_trainer.dpo_trainer import DPOTrainer
from easydel.trainers.trainer import Trainer, TrainerOutput
from easydel.trainers.training_arguments import TrainingArguments

__all__ = ["DPOConfig", "DPOTrainer", "Trainer", "TrainerCallback", "TrainerOutput", "TrainingArguments"]

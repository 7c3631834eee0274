"""Options of direct preference optimisation."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from easydel.trainers.direct_preference_optimization_trainer.loss_options import LOSS_OPTIONS
from easydel.trainers.field_checks import require
from easydel.trainers.training_arguments import TrainingArguments


@dataclasses.dataclass(kw_only=True)
class DPOConfig(TrainingArguments):
    """`TrainingArguments` and what preferences add to them; ranges and combinations are checked when it is made."""

    beta: float = 0.1
    """Strength of the pull towards the reference."""
    loss_type: str = "sigmoid"
    """Objective, a name from `easydel.trainers.direct_preference_optimization_trainer.losses`."""
    label_smoothing: float = 0.0
    """Assumed share of pairs whose labels are swapped."""
    rpo_alpha: float | None = None
    """Weight of the chosen completions' negative log-likelihood added to the loss; None adds nothing."""

    max_length: int | None = 512
    """Most tokens of prompt and completion together; None for no limit."""
    max_prompt_length: int | None = 256
    """Most tokens of the prompt; None for no limit of its own."""
    max_completion_length: int | None = None
    """Most tokens of a completion; None for no limit of its own."""
    truncation_mode: Literal["keep_end", "keep_start"] = "keep_end"
    """Which end of an over-long prompt survives; completions lose their tail."""
    padding_value: int | None = None
    """Token id that fills rows; None takes the tokenizer's pad id."""
    tools: list[Any] | None = None
    """Tools for the chat template; a row's own "tools" column wins."""
    chat_template_kwargs: dict[str, Any] | None = None
    """More arguments of the chat template, e.g. enable_thinking; a row's own column wins key by key."""

    packing: bool = True
    """Put several pairs into one row; changes speed and memory, not results."""
    share_prompt: bool = True
    """Run each prompt once for both completions; changes speed and memory, not results."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.beta > 0, "beta", self.beta, "a number above 0")
        require(self.loss_type in LOSS_OPTIONS, "loss_type", self.loss_type, f"one of {', '.join(LOSS_OPTIONS)}")
        require(0 <= self.label_smoothing < 0.5, "label_smoothing", self.label_smoothing, "a share from 0 to below 0.5")
        require(self.rpo_alpha is None or self.rpo_alpha > 0, "rpo_alpha", self.rpo_alpha, "None or a number above 0")
        for field, least in (("max_length", 2), ("max_prompt_length", 1), ("max_completion_length", 1)):
            value = getattr(self, field)
            require(value is None or value >= least, field, value, f"None or at least {least} tokens")
        if self.max_length is not None:
            for field in ("max_prompt_length", "max_completion_length"):
                value = getattr(self, field)
                if value is not None and value >= self.max_length:
                    raise ValueError(
                        f"{field}={value} leaves no room for the rest in max_length={self.max_length}; lower it too, "
                        f"for example {field}={self.max_length // 2}, or set it to None for no limit of its own."
                    )
        if self.truncation_mode != "keep_end" and self.max_prompt_length is None:
            raise ValueError(
                f"truncation_mode={self.truncation_mode!r} has no effect with max_prompt_length=None: prompts are then "
                "never truncated. Set max_prompt_length."
            )
        require(
            self.padding_value is None or self.padding_value >= 0, "padding_value", self.padding_value, "a token id"
        )

"""Declare and check the options of direct preference optimisation."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from easydel.options import COUNT, INDEX, POSITIVE, Range, is_default, option_field, require
from easydel.trainers.direct_preference_optimization_trainer.objectives.combined import (
    CombinedObjective,
    make_objective,
)
from easydel.trainers.direct_preference_optimization_trainer.objectives.f_divergence import FDivergence
from easydel.trainers.direct_preference_optimization_trainer.objectives.objective import (
    OBJECTIVES,
    named_objectives,
    option_fields,
    owned_option,
    owners,
)
from easydel.trainers.training_arguments import TrainingArguments


@dataclasses.dataclass(kw_only=True)
class DPOConfig(TrainingArguments):
    """Options of a DPO run: `TrainingArguments` and those of preferences; ranges and combinations are checked on
    construction."""

    loss_type: str | list[str] = option_field(
        "sigmoid",
        changes="result",
        help=f"Objective, or a list of objectives that are added up: {', '.join(OBJECTIVES)}.",
    )
    loss_weights: list[float] | None = option_field(None, changes="result")
    """Weight of each objective of a list; None weighs all by 1."""
    # Options of the objectives, which declare their defaults, ranges and help.
    beta: float = owned_option("beta")
    label_smoothing: float = owned_option("label_smoothing")
    f_divergence_type: FDivergence = owned_option("f_divergence_type")
    f_alpha_divergence_coef: float = owned_option("f_alpha_divergence_coef")
    discopop_tau: float = owned_option("discopop_tau")
    target_margin: float = owned_option("target_margin")
    dpop_lambda: float = owned_option("dpop_lambda")
    alphapo_alpha: float = owned_option("alphapo_alpha")

    ld_alpha: float | None = option_field(None, changes="result")
    """Weight, 0 to 1, of the tokens beyond the shorter completion's length; None weighs all alike."""
    rpo_alpha: float | None = option_field(None, changes="result", within=POSITIVE)
    """Weight of the chosen completions' negative log-likelihood added to the loss; None adds nothing."""
    use_weighting: bool = option_field(False, changes="result")
    """Weigh each pair by the probability that the policy gives its completions (WPO)."""
    reference_free: bool = option_field(False, changes="result")
    """Take a uniform reference: its log-probs count as 0, and no reference model is kept."""
    precompute_ref_log_probs: bool = option_field(False, changes="session")
    """Score all data with the reference before training, then free the memory of its weights."""
    sync_ref_model: bool = option_field(False, changes="result")
    """Let the reference follow the policy (TR-DPO)."""
    ref_model_mixup_alpha: float = option_field(0.9, changes="result", within=Range("a share", above=0, most=1))
    """Share of the policy in the reference after a sync: reference = alpha * policy + (1 - alpha) * reference."""
    ref_model_sync_steps: int = option_field(64, changes="result", within=COUNT)
    """Updates from one sync to the next."""

    max_length: int | None = option_field(512, changes="result", within=Range("a whole number", least=2))
    """Most tokens of prompt and completion together; None for no limit."""
    max_prompt_length: int | None = option_field(256, changes="result", within=COUNT)
    """Most tokens of the prompt; None for no limit of its own."""
    max_completion_length: int | None = option_field(None, changes="result", within=COUNT)
    """Most tokens of a completion; None for no limit of its own."""
    truncation_mode: Literal["keep_end", "keep_start"] = option_field("keep_end", changes="result")
    """Which end of an over-long prompt survives; completions lose their tail."""
    padding_value: int | None = option_field(None, changes="result")
    """Token id that fills rows; None takes the tokenizer's pad id."""
    tools: list[Any] | None = option_field(None, changes="result")
    """Tools for the chat template; a row's own "tools" column wins."""
    chat_template_kwargs: dict[str, Any] | None = option_field(None, changes="result")
    """More arguments of the chat template, e.g. enable_thinking; a row's own column wins key by key."""

    eval_samples: int = option_field(0, changes="session", within=INDEX)
    """Prompts of each evaluation set, its first ones, that the model answers at every evaluation (samples.jsonl)."""
    eval_sample_tokens: int = option_field(128, changes="session", within=COUNT)
    """Most tokens of such an answer."""

    packing: bool = option_field(True, changes="layout")
    """Put several pairs into one row of the batch; changes speed and memory, not results."""
    share_prompt: bool = option_field(True, changes="layout")
    """Run each prompt once for both completions; changes speed and memory, not results."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_objective()
        self._check_sync()
        if self.eval_samples and self.do_eval is False:
            raise ValueError(
                f"eval_samples={self.eval_samples} has no effect with do_eval=False; remove one of the two."
            )
        if self.eval_samples == 0 and not is_default(self, "eval_sample_tokens"):
            raise ValueError(
                f"eval_sample_tokens={self.eval_sample_tokens} has no effect without eval_samples; set both."
            )
        self._check_precompute()
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

    def _check_sync(self) -> None:
        alpha, steps = self.ref_model_mixup_alpha, self.ref_model_sync_steps
        if self.sync_ref_model and self.reference_free:
            raise ValueError("sync_ref_model=True has no effect with reference_free=True; remove one of the two.")
        if self.sync_ref_model and self.quantize_base is not None:
            raise ValueError(
                f"sync_ref_model=True mixes the policy's weights into the reference, which quantize_base="
                f"{self.quantize_base!r} keeps in 8 bits with the policy; remove one of the two."
            )
        are_defaults = is_default(self, "ref_model_mixup_alpha") and is_default(self, "ref_model_sync_steps")
        if not self.sync_ref_model and not are_defaults:
            raise ValueError(
                f"ref_model_mixup_alpha={alpha} and ref_model_sync_steps={steps} have no effect with "
                "sync_ref_model=False; set it to True or leave them at 0.9 and 64."
            )

    def _check_precompute(self) -> None:
        if not self.precompute_ref_log_probs:
            return
        if self.reference_free:
            raise ValueError(
                "precompute_ref_log_probs=True has no effect with reference_free=True: there is no reference to score "
                "with. Remove one of the two."
            )
        if self.sync_ref_model:
            raise ValueError(
                "precompute_ref_log_probs=True holds the reference's log-probs fixed, but sync_ref_model=True moves "
                "the reference; remove one of the two."
            )

    @property
    def loss_types(self) -> tuple[str, ...]:
        """The names of the objectives, as a tuple even if there is only one."""
        return (self.loss_type,) if isinstance(self.loss_type, str) else tuple(self.loss_type)

    @property
    def objective(self) -> CombinedObjective:
        """The loss of this configuration.

        Raises:
          ValueError: an option is out of range for an objective that owns it.
        """
        options = {name: getattr(self, name) for name in option_fields()}
        return make_objective(self.loss_types, options, self.loss_weights, self.rpo_alpha)

    @property
    def reads_reference(self) -> bool:
        """True if an objective compares the policy with a reference; otherwise there are no rewards either."""
        return any(OBJECTIVES[name].needs_reference for name in self.loss_types)

    @property
    def keeps_reference(self) -> bool:
        """True if there is a reference model to score with."""
        return self.reads_reference and not self.reference_free

    def check_reference(self, given: str, fix: str = "leave it out") -> None:
        """Refuse a reference that would have no effect.

        Args:
          given: subject and verb of the error, such as "reference_model has".
          fix: what the error tells the user to do with it.

        Raises:
          ValueError: no reference is kept.
        """
        if not self.reads_reference:
            raise ValueError(
                f"{given} no effect with loss_type={self.loss_type!r}, which compares the policy with no reference; "
                f"{fix}, or add an objective that does, such as sigmoid."
            )
        if self.reference_free:
            raise ValueError(f"{given} no effect with reference_free=True; {fix}, or set reference_free=False.")

    def _check_objective(self) -> None:
        """Check the ranges of the objectives' options, and that each option given has an effect."""
        named_objectives(self.loss_type)
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_types):
            raise ValueError(
                f"loss_weights has {len(self.loss_weights)} numbers for {len(self.loss_types)} objectives; "
                "give one weight for each name in loss_type."
            )
        for name, weight in zip(self.loss_types, self.loss_weights or ()):
            expected = f"a number above 0 for {name}; an objective without weight is left out of loss_type"
            require(weight > 0, "loss_weights", self.loss_weights, expected)
        for option, field in option_fields().items():
            value, honoured_by = getattr(self, option), owners(option)
            if value != field.default and not set(honoured_by) & set(self.loss_types):
                raise ValueError(
                    f"{option}={value!r} has no effect with loss_type={self.loss_type!r}; it is honoured by "
                    f"{', '.join(honoured_by)}.\nSet {option}={field.default!r} or choose one of those losses."
                )
        require(
            self.ld_alpha is None or 0 <= self.ld_alpha < 1,
            "ld_alpha",
            self.ld_alpha,
            "None or a share from 0 to below 1",
        )
        objective = self.objective
        if objective.needs_whole_update:
            self._check_whole_update()
        if not objective.is_preference:
            for option in ("ld_alpha", "use_weighting"):
                if not is_default(self, option):
                    raise ValueError(
                        f"{option}={getattr(self, option)!r} has no effect with loss_type={self.loss_type!r} alone, "
                        "which does not compare completions; leave it out."
                    )
        if not objective.needs_reference:
            self._check_without_reference()

    def _check_whole_update(self) -> None:
        sorting = ", ".join(sorted(name for name in self.loss_types if OBJECTIVES[name].needs_whole_update))
        if self.gradient_accumulation_steps > 1:
            raise ValueError(
                f"{sorting} sorts all pairs of an update, so it cannot be computed in "
                f"gradient_accumulation_steps={self.gradient_accumulation_steps} micro-batches; set it to 1."
            )
        if self.micro_batch_tokens is not None:
            raise ValueError(
                f"{sorting} sorts all pairs of an update, so all go through the model at once and "
                f"micro_batch_tokens={self.micro_batch_tokens} has no effect; set it to None."
            )
        if self.use_weighting:
            raise ValueError(f"use_weighting=True weighs pairs, but {sorting} compares sorted values.")

    def _check_without_reference(self) -> None:
        for option in ("reference_free", "precompute_ref_log_probs", "sync_ref_model"):
            if not is_default(self, option):
                raise ValueError(
                    f"{option}={getattr(self, option)!r} has no effect with loss_type={self.loss_type!r}, which "
                    "compares the policy with no reference; leave it out."
                )
        if self.best_metric is not None and "/rewards/" in self.best_metric:
            raise ValueError(
                f"best_metric={self.best_metric!r} is not there with loss_type={self.loss_type!r}: rewards need a "
                'reference. Choose another, for example "eval/loss".'
            )

"""Combine the objectives of a configuration into one loss: weigh them and add them up."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from easydel.trainers.direct_preference_optimization_trainer.objectives.numerics import exp
from easydel.trainers.direct_preference_optimization_trainer.objectives.objective import (
    OBJECTIVES,
    Objective,
    option_fields,
)
from easydel.trainers.direct_preference_optimization_trainer.objectives.sft import SFT

if TYPE_CHECKING:
    from easydel.trainers.direct_preference_optimization_trainer.objectives.scores import PairScores, PerPair


@dataclasses.dataclass(frozen=True, kw_only=True)
class CombinedObjective:
    """``sum_i weight_i * objective_i``, plus ``rpo_alpha`` times `SFT`.

    A pair's weight of WPO multiplies the objectives, not the `rpo_alpha` term, and carries no gradient (Zhou et al.,
    WPO, 2024).

    Attributes:
      objectives: what is added up.
      weights: one number above 0 for each.
      beta: factor of the log-ratios in the logged rewards.
      rpo_alpha: weight of `SFT`; None adds nothing.
    """

    objectives: tuple[Objective, ...]
    weights: tuple[float, ...]
    beta: float
    rpo_alpha: float | None = None

    @property
    def needs_reference(self) -> bool:
        """True if one of them compares the policy with a reference."""
        return any(objective.needs_reference for objective in self.objectives)

    @property
    def needs_whole_update(self) -> bool:
        """True if one of them must see all pairs of an update at once."""
        return any(objective.needs_whole_update for objective in self.objectives)

    @property
    def needs_margin(self) -> bool:
        """True if one of them reads the rows' column "margin"."""
        return any(objective.needs_margin for objective in self.objectives)

    @property
    def is_preference(self) -> bool:
        """True if one of them compares the two completions of a pair."""
        return any(objective.is_preference for objective in self.objectives)

    def __call__(self, scores: PairScores) -> PerPair:
        """Compute one loss per pair, float32; the update's loss is their mean."""
        import jax

        loss = jax.numpy.zeros_like(scores.chosen_logps)
        for weight, objective in zip(self.weights, self.objectives, strict=True):
            loss += weight * objective(scores)
        if scores.log_weight is not None:
            loss *= jax.lax.stop_gradient(exp(scores.log_weight))
        return loss if self.rpo_alpha is None else loss + self.rpo_alpha * SFT()(scores)


def make_objective(
    names: Sequence[str],
    options: Mapping[str, Any],
    weights: Sequence[float] | None = None,
    rpo_alpha: float | None = None,
) -> CombinedObjective:
    """Make the objectives of these names, each with those of the options that it owns.

    Args:
      names: as in `loss_type`.
      options: by name, such as ``{"beta": 0.1}``; an option that is not given has its default.
      weights: one for each name; None weighs all by 1.
      rpo_alpha: weight of `SFT` beside them; None adds nothing.

    Raises:
      ValueError: an option is out of range.

    Example:
      >>> objective = make_objective(["sigmoid", "sft"], {"beta": 0.2}, weights=[1.0, 0.5])
      >>> objective.needs_reference, objective.needs_whole_update, objective.objectives[0].beta
      (True, False, 0.2)
    """
    made = []
    for name in names:
        kind = OBJECTIVES[name]
        own = {field.name for field in dataclasses.fields(kind)}
        made.append(kind(**{option: value for option, value in options.items() if option in own}))
    return CombinedObjective(
        objectives=tuple(made),
        weights=tuple(weights or [1.0] * len(made)),
        beta=options.get("beta", option_fields()["beta"].default),
        rpo_alpha=rpo_alpha,
    )

"""Define the objective, a frozen dataclass that owns its options, and register every objective by name."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from easydel.options import POSITIVE, Range, check_ranges, option_field, require

if TYPE_CHECKING:
    from easydel.trainers.direct_preference_optimization_trainer.objectives.scores import PairScores, PerPair


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective(abc.ABC):
    """A loss of each pair, as a function of the pair's scores. Its fields are its options.

    A subclass says what it needs; what is not needed is not computed, and is refused if it is given.

    Attributes:
      needs_reference: whether it compares the policy with a reference.
      needs_whole_update: whether it must see all pairs of an update at once.
      needs_margin: whether it reads the rows' column "margin".
      is_preference: whether it compares the two completions of a pair.
      paper: its source, as author, year and arXiv number.

    Raises:
      ValueError: an option is out of range; names it, what was given and what was expected.
    """

    needs_reference: ClassVar[bool] = True
    needs_whole_update: ClassVar[bool] = False
    needs_margin: ClassVar[bool] = False
    is_preference: ClassVar[bool] = True
    paper: ClassVar[str]

    def __post_init__(self) -> None:
        check_ranges(self)

    @abc.abstractmethod
    def __call__(self, scores: PairScores) -> PerPair:
        """Compute one loss per pair, float32; the update's loss is their mean."""


def beta_option() -> Any:
    """Declare the option `beta`, which most objectives own."""
    return option_field(
        0.1,
        changes="result",
        within=POSITIVE,
        help="Strength of the pull towards the reference; without a reference, the scale of the margin.",
    )


def label_smoothing_option() -> Any:
    """Declare the option `label_smoothing`, which several objectives own."""
    return option_field(
        0.0,
        changes="result",
        within=Range("a share", least=0, below=0.5),
        help="Assumed share of pairs whose labels are swapped.",
    )


# Every name that `loss_type` takes, in the order in which the package `objectives` imports its files.
OBJECTIVES: dict[str, type[Objective]] = {}
_Class = TypeVar("_Class", bound=type[Objective])


def register(*names: str) -> Callable[[_Class], _Class]:
    """Make an objective known to `loss_type` under one or more names.

    Raises:
      ValueError: another objective has the name.
    """

    def add(objective: _Class) -> _Class:
        for name in names:
            if name in OBJECTIVES:
                raise ValueError(f"two objectives are called {name}: {OBJECTIVES[name]} and {objective}.")
            OBJECTIVES[name] = objective
        return objective

    return add


def named_objectives(loss_type: str | Sequence[str]) -> list[type[Objective]]:
    """Look up the objectives that `loss_type` names, one name or several.

    Raises:
      ValueError: there is no name, or no objective of a name.

    Example:
      >>> [objective.needs_margin for objective in named_objectives(["sigmoid", "odpo"])]
      [False, True]
    """
    names = [loss_type] if isinstance(loss_type, str) else loss_type
    require(bool(names), "loss_type", loss_type, "at least one objective")
    for name in names:
        require(name in OBJECTIVES, "loss_type", name, f"one of {', '.join(OBJECTIVES)}")
    return [OBJECTIVES[name] for name in names]


def owners(option_name: str) -> list[str]:
    """List the names of the objectives that own an option."""
    return [
        name
        for name, objective in OBJECTIVES.items()
        if option_name in (field.name for field in dataclasses.fields(objective))
    ]


def option_fields() -> dict[str, dataclasses.Field[Any]]:
    """Map the name of every option of every objective to the field that declares it."""
    return {field.name: field for objective in OBJECTIVES.values() for field in dataclasses.fields(objective)}


def owned_option(name: str) -> Any:
    """Make the field of `DPOConfig` for an option, as the objectives that own it declare it."""
    declared = option_fields()[name]
    return dataclasses.field(default=declared.default, metadata=declared.metadata)

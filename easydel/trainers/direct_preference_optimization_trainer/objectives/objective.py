"""What an objective is: a frozen dataclass that owns its options; and the registry of all of them."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from easydel.options import POSITIVE, Range, check_ranges, option_field

if TYPE_CHECKING:
    from easydel.trainers.direct_preference_optimization_trainer.objectives.scores import PairScores, PerPair


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective(abc.ABC):
    """A loss of each pair, as a function of the pair's scores. Its fields are its options.

    A subclass says what it needs; what is not needed is not computed, and is refused where it is given.

    Attributes:
      needs_reference: whether it compares the policy with a reference.
      needs_whole_update: whether it must see all pairs of an update at once.
      needs_margin: whether it reads the rows' column "margin".
      is_preference: whether it compares the two completions of a pair.
      paper: where it comes from, author, year and arXiv number.

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
        """One loss a pair, float32; the update's loss is their mean."""


def beta_option() -> Any:
    """The option `beta`, which most objectives own."""
    return option_field(
        0.1,
        changes="result",
        within=POSITIVE,
        help="Strength of the pull towards the reference; without a reference, the scale of the margin.",
    )


def label_smoothing_option() -> Any:
    """The option `label_smoothing`, which several objectives own."""
    return option_field(
        0.0,
        changes="result",
        within=Range("a share", least=0, below=0.5),
        help="Assumed share of pairs whose labels are swapped.",
    )


# Every name that `loss_type` takes, in alphabetical order of the files; importing the package `objectives` fills it.
OBJECTIVES: dict[str, type[Objective]] = {}
_Class = TypeVar("_Class", bound=type[Objective])


def register(*names: str) -> Callable[[_Class], _Class]:
    """Make an objective known to `loss_type` under a name, and further names for the same."""

    def add(objective: _Class) -> _Class:
        for name in names:
            if name in OBJECTIVES:
                raise ValueError(f"two objectives are called {name}: {OBJECTIVES[name]} and {objective}.")
            OBJECTIVES[name] = objective
        return objective

    return add


def owners(option_name: str) -> list[str]:
    """The names of the objectives that own an option."""
    return [
        name
        for name, objective in OBJECTIVES.items()
        if option_name in (field.name for field in dataclasses.fields(objective))
    ]


def option_fields() -> dict[str, dataclasses.Field[Any]]:
    """Every option of every objective, by name."""
    return {field.name: field for objective in OBJECTIVES.values() for field in dataclasses.fields(objective)}


def owned_option(name: str) -> Any:
    """The field of `DPOConfig` for an option, as the objectives that own it declare it."""
    declared = option_fields()[name]
    return dataclasses.field(default=declared.default, metadata=declared.metadata)

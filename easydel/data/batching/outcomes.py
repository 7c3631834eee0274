"""Rows to good pairs: each row's outcome in order, and a Grain stage that counts and leaves out the bad ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import grain

from easydel.data.faults import FaultTally, RowFault
from easydel.data.tree import PreferencePair

Transform: TypeAlias = Callable[[Any, int], PreferencePair | RowFault]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one row.

    Attributes:
      result: the pair, or what is wrong with the row.
      epoch: how many times the data was read to its end before.
      location: of a row that is bad, such as "train.jsonl, row 812".
    """

    result: PreferencePair | RowFault
    epoch: int
    location: str = ""


class GoodPairs(grain.IterDataset):
    """The good pairs of a dataset of outcomes, in order; every outcome that goes by is counted in `tally`.

    The counts belong to the iterator's state, so that they continue with it.
    """

    def __init__(self, outcomes: grain.IterDataset, tally: FaultTally):
        super().__init__(outcomes)
        self._tally = tally

    def __iter__(self) -> grain.DatasetIterator:
        return _GoodPairsIterator(iter(self._parent), self._tally)

    def __str__(self) -> str:
        return "GoodPairs"


class _GoodPairsIterator(grain.DatasetIterator):
    def __init__(self, outcomes: grain.DatasetIterator, tally: FaultTally):
        super().__init__(outcomes)
        self._tally = tally

    def __next__(self) -> PreferencePair:
        while True:
            outcome: Outcome = next(self._parent)
            if not isinstance(outcome.result, RowFault):
                self._tally.record_good(outcome.epoch)
                return outcome.result
            self._tally.record(outcome.result, outcome.location, outcome.epoch)

    def get_state(self) -> dict[str, Any]:
        return {"rows": self._parent.get_state(), "tally": self._tally.state()}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["rows"])
        self._tally.restore(state["tally"])

    def __str__(self) -> str:
        return "GoodPairsIterator"

"""Name what is wrong with a row, and count the rows that were dropped for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from easydel.errors import short_repr, shortened, visible

FaultReason = Literal[
    "unreadable row",
    "missing column",
    "missing value",
    "wrong type",
    "unknown role",
    "bad value",
    "unused column",
    "empty prompt",
    "empty completion",
    "chosen equals rejected",
    "no shared prompt",
    "prompt repeated in completion",
    "prompt over the limit",
    "completion truncated to nothing",
    "template error",
    "unstable template",
    "no chat template",
    "unfit tokenizer",
]
FAULT_REASONS: tuple[str, ...] = get_args(FaultReason)

MINIMUM_ROWS_TO_JUDGE = 100
EXAMPLES_PER_REASON = 3
LISTED_NAMES, LONGEST_NAME = 20, 40
GOOD = "good"  # counted beside the reasons


class DataError(ValueError):
    """The data cannot be trained on; the message names the rows, the reason, and the fix.

    A message may quote any text of the data, so control characters are made visible.
    """

    def __init__(self, message: str):
        super().__init__(visible(message))


class UnreadableRow(DataError):
    """One row cannot be read; the same iterator continues with the rows after it."""


@dataclass(frozen=True, slots=True)
class RowFault:
    """The reason why one row cannot become a preference pair.

    Attributes:
      index: the row's position in the data, -1 when unknown.
      field: the column at fault.
      reason: one of `FAULT_REASONS`.
      message: what was given, what was expected, and the fix; without the row's location.
      structural: True where the cause is the data set or the tokenizer rather than this row, so that no row will work.
    """

    index: int
    field: str
    reason: FaultReason
    message: str
    structural: bool = False


class BadRow(Exception):
    """Carry a fault from where it is found to the transform, which returns it as a `RowFault`."""

    def __init__(self, field: str, reason: FaultReason, message: str, *, structural: bool = False):
        super().__init__(message)
        self.field = field
        self.reason = reason
        self.message = message
        self.structural = structural

    def at(self, index: int) -> RowFault:
        """This fault as a value, for the row at `index`."""
        return RowFault(index, self.field, self.reason, visible(self.message), self.structural)


def empty_completion(field: str, found: str) -> BadRow:
    """The fault of a completion without text; `found` says how it is empty."""
    return BadRow(field, "empty completion", f"{found}. Give the answer's text, or remove the row.")


def empty_prompt(found: str) -> BadRow:
    """The fault of a prompt without text; `found` says how it is empty."""
    return BadRow("prompt", "empty prompt", f"{found}. Give a prompt, or remove the row.")


def unreadable(error: UnreadableRow, index: int) -> RowFault:
    """The fault of a row that a source could not read."""
    return RowFault(index, "row", "unreadable row", str(error))


def describe(value: object) -> str:
    """Describe a value for a message: its type, then the value itself, shortened."""
    return visible(f"{type(value).__name__} {short_repr(value)}")


def in_quotes(names: Iterable[object]) -> str:
    """The first few names in quotes, each shortened, and the number of the others."""
    quoted = [f'"{shortened(name, LONGEST_NAME)}"' for name in map(str, names)]
    more = len(quoted) - LISTED_NAMES
    return visible(", ".join(quoted[:LISTED_NAMES])) + (f" and {more} more" if more > 0 else "")


class FaultTally:
    """Count good and dropped rows, and stop the run when too large a share is dropped.

    An epoch sees every row once, so the counts of one epoch are those of the data, and no row has to be remembered.
    Where epochs differ, because rows are made at random, the largest count of any epoch is taken.

    Args:
      limit: the largest share of rows, 0 to 1, that may be dropped. It is judged once `MINIMUM_ROWS_TO_JUDGE` rows
        were seen, and by `check(final=True)` at the end of the data.

    Raises:
      DataError: from `record` and `check`, when the share is over the limit, or on a structural fault before any
        good row.
      ValueError: `limit` is not a share.

    Example:
      >>> tally = FaultTally(limit=0.5)
      >>> tally.record_good()
      >>> tally.record(RowFault(1, "chosen", "empty completion", '"chosen" is empty.'), "train.jsonl, row 1")
      >>> tally.rows_seen, tally.dropped
      (2, {'empty completion': 1})
    """

    def __init__(self, limit: float = 0.05):
        if not 0 <= limit <= 1:
            raise ValueError(f"limit={limit} is not a share of rows; expected a number from 0 to 1, such as 0.05.")
        self.limit = limit
        self._epoch = 0
        self._current: Counter[str] = Counter()
        self._earlier: Counter[str] = Counter()
        self._examples: dict[str, list[str]] = {}

    @property
    def rows_seen(self) -> int:
        """Good and dropped rows together."""
        return self._counts().total()

    @property
    def dropped(self) -> dict[str, int]:
        """Dropped rows by reason, the most frequent first."""
        return dict(self._dropped().most_common())

    def record_good(self, epoch: int = 0) -> None:
        """Count a row that became a pair."""
        self._add(GOOD, epoch)

    def record(self, fault: RowFault, location: str, epoch: int = 0) -> None:
        """Count one dropped row; `location` says where it lies, such as "train.jsonl, row 812"."""
        self._add(fault.reason, epoch)
        example = visible(f"{location}: {fault.message}")
        examples = self._examples.setdefault(fault.reason, [])
        if len(examples) < EXAMPLES_PER_REASON and example not in examples:
            examples.append(example)
        if fault.structural and not self._counts()[GOOD]:
            raise DataError(example)
        self.check()

    def state(self) -> dict[str, Any]:
        """All counts so far, in JSON types; `restore` continues from them."""
        return {
            "epoch": self._epoch,
            "current": dict(self._current),
            "earlier": dict(self._earlier),
            "examples": {reason: list(examples) for reason, examples in self._examples.items()},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from the counts that `state` returned."""
        self._epoch = state["epoch"]
        self._current, self._earlier = Counter(state["current"]), Counter(state["earlier"])
        self._examples = {reason: list(examples) for reason, examples in state["examples"].items()}

    def check(self, final: bool = False) -> None:
        """Raise `DataError` when more than `limit` of the rows were dropped; `final` judges however few were seen."""
        seen, dropped, good = self.rows_seen, self._dropped().total(), self._counts()[GOOD]
        too_early = seen < MINIMUM_ROWS_TO_JUDGE and not final
        if dropped == 0 or too_early or (good and dropped <= self.limit * seen):
            return
        raise DataError(
            f"{_count(dropped)} of {_count(seen)} rows cannot be used, over the limit of {_percent(self.limit)}.\n"
            f"{self.summary()}\nMend or remove these rows, or raise the limit if dropping them is what you want."
        )

    def summary(self) -> str:
        """One line per reason with its first examples, or one line that says nothing was dropped."""
        seen, dropped = self.rows_seen, self._dropped()
        if not dropped:
            return f"No rows were dropped ({_count(seen)} seen)."
        lines = []
        for reason, count in dropped.most_common():
            first, *others = self._examples[reason]
            were = "was" if count == 1 else "were"
            lines.append(
                f"{first} {_count(count)} of {_count(seen)} rows {were} dropped for this reason ({reason}; "
                f"{_percent(count / seen)}, limit {_percent(self.limit)})."
            )
            lines.extend(f"  also {example}" for example in others)
        return "\n".join(lines)

    def _add(self, what: str, epoch: int) -> None:
        if epoch != self._epoch:
            self._earlier, self._current, self._epoch = self._counts(), Counter(), epoch
        self._current[what] += 1

    def _counts(self) -> Counter[str]:
        return self._earlier | self._current  # the larger count of each

    def _dropped(self) -> Counter[str]:
        counts = self._counts()
        del counts[GOOD]
        return counts


def _count(number: int) -> str:
    """1204 as "1 204"."""
    return f"{number:,}".replace(",", " ")


def _percent(share: float) -> str:
    """0.0025 as "0.2 %", 0.05 as "5 %"; never rounds a dropped row away to 0."""
    percent = 100 * share
    if 0 < percent < 0.1:
        return "under 0.1 %"
    return f"{percent:.1f}".removesuffix(".0") + " %"

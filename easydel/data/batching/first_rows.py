"""Check a few rows before anything expensive starts, and compute a digest of a data set from some of its rows."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from easydel.data.faults import MINIMUM_ROWS_TO_JUDGE, DataError, FaultTally, RowFault, UnreadableRow, unreadable
from easydel.data.preference.transform import PreferenceTransform, Transform
from easydel.data.sources.base import Row, ShardedDataSource
from easydel.data.tree import PreferencePair

FIRST_ROWS = 16
IDENTITY_ROWS = 64


def readable_rows(source: ShardedDataSource) -> Iterator[tuple[int, Row]]:
    """Indices and rows of a source without the rows that cannot be read; `PreferenceLoader` counts these."""
    rows = iter(source)
    for index in itertools.count():
        try:
            yield index, next(rows)
        except StopIteration:
            return
        except UnreadableRow:
            continue


def check_first_rows(
    source: ShardedDataSource, transform: Transform, max_dropped_share: float, rows: int = FIRST_ROWS
) -> list[PreferencePair]:
    """Check a few rows before anything expensive starts, or all of them where they are few.

    Args:
      source: the rows.
      transform: row and its index -> pair or fault.
      max_dropped_share: largest share of rows, 0 to 1, that may be dropped; judged here only where all rows are read.
      rows: number of rows to check.

    Returns:
      The pairs of the good rows.

    Raises:
      DataError: there are no rows, they show a structural fault, none is good, all have weight 0, or a small set has
        too many bad ones.
    """
    is_whole = source.has_random_access and len(source) <= MINIMUM_ROWS_TO_JUDGE
    tally = FaultTally(max_dropped_share if is_whole else 1.0)
    first, pairs = iter(source), []
    for index in range(len(source) if is_whole else rows):
        try:
            result = transform(next(first), index)
        except StopIteration:
            break
        except UnreadableRow as error:
            result = unreadable(error, index)
        if isinstance(result, RowFault):
            tally.record(result, source.locate(index))
        else:
            tally.record_good()
            pairs.append(result)
    if tally.rows_seen == 0:
        raise DataError("the data holds no rows.")
    tally.check(final=True)
    if all(pair.weight == 0 for pair in pairs):
        which = "every good row" if is_whole else f"each of the first {len(pairs)} good rows"
        raise DataError(
            f'{source.locate(pairs[0].index)}: "weight" is 0, as in {which}, so that nothing is trained. Give weights '
            'above 0, drop the column, or leave such rows out: source.filter(lambda row: float(row["weight"]) > 0).'
        )
    return pairs


def refuse_inert_template_options(first: Sequence[Mapping[str, Any]], transform: PreferenceTransform) -> None:
    """Refuse ``tools`` and ``chat_template_kwargs`` that change no token of the first rows.

    Rows of plain text use no template, a template may not use a variable, and a row's own column wins.

    Raises:
      ValueError: an option has no effect; names it and the key.
    """
    without: dict[str, PreferenceTransform] = {}
    if transform.tools is not None:
        without["tools"] = dataclasses.replace(transform, tools=None)
    for key in transform.chat_template_kwargs or {}:
        others = {name: value for name, value in (transform.chat_template_kwargs or {}).items() if name != key}
        without[f"chat_template_kwargs[{key!r}]"] = dataclasses.replace(transform, chat_template_kwargs=others)
    if not without:
        return
    for option, other in without.items():
        if all(_same(transform(row), other(row)) for row in first):
            raise ValueError(
                f"{option} has no effect: the first {len(first)} rows give the same tokens without it. Rows of plain "
                "text use no chat template, the tokenizer's template may not use it, and a row's own column wins; "
                "leave it out, or mend the template or the rows."
            )


def _same(a: PreferencePair | RowFault, b: PreferencePair | RowFault) -> bool:
    if isinstance(a, RowFault) or isinstance(b, RowFault):
        return a == b
    ids = ("prompt_ids", "chosen_ids", "rejected_ids")
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ids)


def data_identity(source: ShardedDataSource, transform: Transform) -> dict[str, Any]:
    """Number of rows, where it is known, and a digest of the pairs that some of them become.

    The digest is over token ids, so it changes with the rows, the tokenizer, the chat template and the limits. The rows
    are spread evenly over the data; where rows can only be read in order, the first ones are taken.
    """
    digest = hashlib.sha256()
    for index, row in _some_rows(source):
        pair = transform(row, index) if row is not None else None
        if pair is None or isinstance(pair, RowFault):
            digest.update(f"{index} cannot be used".encode())
            continue
        for values in (
            pair.prompt_ids,
            pair.chosen_ids,
            pair.rejected_ids,
            pair.chosen_loss_mask,
            pair.rejected_loss_mask,
        ):
            digest.update(np.int64(values.size).tobytes() + values.tobytes())
        digest.update(repr((pair.weight, pair.ref_chosen_logps, pair.ref_rejected_logps)).encode())
        if pair.margin is not None:
            digest.update(repr(pair.margin).encode())
    return {"rows": len(source) if source.has_random_access else None, "digest": digest.hexdigest()}


def _some_rows(source: ShardedDataSource) -> Iterator[tuple[int, Row | None]]:
    if not source.has_random_access:
        with contextlib.suppress(DataError):  # reported when its turn comes
            yield from enumerate(itertools.islice(source, IDENTITY_ROWS))
        return
    for index in sorted(set(np.linspace(0, len(source) - 1, IDENTITY_ROWS).astype(int).tolist())):
        try:
            yield index, source[index]
        except DataError:  # reported when its turn comes
            yield index, None

"""What tells one data set from another, without reading all of it."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from easydel.data.batching.outcomes import Transform
from easydel.data.faults import DataError, RowFault
from easydel.data.sources.base import Row, ShardedDataSource

ROWS = 64


def data_identity(source: ShardedDataSource, transform: Transform) -> dict[str, Any]:
    """Number of rows, where it is known, and a digest of what becomes of some of them.

    The digest is over token ids, so it changes with the rows, the tokenizer, the chat template and the limits. It is
    taken over rows spread evenly over the data; over the first ones where rows can only be read in order.
    """
    digest = hashlib.sha256()
    for index, row in _some_rows(source):
        pair = transform(row, index) if row is not None else None
        if pair is None or isinstance(pair, RowFault):
            digest.update(f"{index} cannot be used".encode())
            continue
        for part in (
            pair.prompt_ids,
            pair.chosen_ids,
            pair.rejected_ids,
            pair.chosen_loss_mask,
            pair.rejected_loss_mask,
        ):
            digest.update(np.int64(part.size).tobytes() + part.tobytes())
        digest.update(repr((pair.weight, pair.ref_chosen_logps, pair.ref_rejected_logps)).encode())
    return {"rows": len(source) if source.has_random_access else None, "digest": digest.hexdigest()}


def _some_rows(source: ShardedDataSource) -> Iterator[tuple[int, Row | None]]:
    if not source.has_random_access:
        with contextlib.suppress(DataError):  # reported when its turn comes
            yield from enumerate(itertools.islice(source, ROWS))
        return
    for index in sorted(set(np.linspace(0, len(source) - 1, ROWS).astype(int).tolist())):
        try:
            yield index, source[index]
        except DataError:  # reported when its turn comes
            yield index, None

"""Pairs, rows or columns to one batch; every callable here can be pickled into a worker process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from easydel.data.batching.columnar import rows_of_columns
from easydel.data.batching.outcomes import Transform
from easydel.data.batching.packing import Batch, PackingLayout, pack
from easydel.data.faults import DataError, RowFault
from easydel.data.tree import PreferencePair


@dataclass(frozen=True)
class Collator:
    """Pairs to one batch.

    Args:
      layout: how pairs become rows of the batch.
      vocab_size: tokens the model has.
      data_collator: makes the batch in place of `pack`; None packs.
    """

    layout: PackingLayout
    vocab_size: int
    data_collator: Callable[[Sequence[PreferencePair]], Batch] | None = None

    def __call__(self, pairs: Sequence[PreferencePair]) -> Batch:
        """The batch.

        Raises:
          DataError: a token id that the model does not have, or a batch that does not hold the pairs.
        """
        refuse_ids_outside(pairs, self.vocab_size)
        if self.data_collator is None:
            return pack(pairs, self.layout)
        batch = self.data_collator(pairs)
        rows, kept = len(batch["input_ids"]), int(np.count_nonzero(batch["pair_mask"]))
        multiple = self.layout.row_multiple * self.layout.micro_batches
        if rows % multiple:
            raise DataError(
                f"data_collator gave {rows} rows; with these devices and gradient_accumulation_steps their number must "
                f"be a multiple of {multiple}: pass row_multiple to PackingLayout, or add empty rows."
            )
        if kept != len(pairs):
            raise DataError(
                f"data_collator was given {len(pairs)} pairs and gave a batch of {kept} (by its pair_mask); every pair "
                "must be in the batch."
            )
        return batch


def refuse_ids_outside(pairs: Sequence[PreferencePair], vocab_size: int) -> None:
    """Refuse pairs with tokens that the model does not have.

    Raises:
      DataError: names the row and the id.
    """
    for pair in pairs:
        largest = max(ids.max() for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids))
        if largest >= vocab_size:
            raise DataError(
                f"row {pair.index} holds token id {largest}, but the model has {vocab_size} tokens: "
                "processing_class is not this model's tokenizer."
            )


@dataclass(frozen=True)
class RowCollator:
    """Rows to one batch; a row that cannot be used is an error, since there is no place to count dropped rows."""

    transform: Transform
    collate: Callable[[Sequence[PreferencePair]], Batch]

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """The batch of the rows' pairs, in their order.

        Raises:
          DataError: a row cannot be used; says which and why.
        """
        pairs = []
        for index, row in enumerate(rows):
            pair = self.transform(row, index)
            if isinstance(pair, RowFault):
                raise DataError(f"row {index} of the batch: {pair.message}")
            pairs.append(pair)
        return self.collate(pairs)


@dataclass(frozen=True)
class ColumnCollator:
    """A dict of columns, as TFDS and ``tf.data`` deliver them, to one batch."""

    collate: Callable[[Sequence[Mapping[str, Any]]], Batch]

    def __call__(self, columns: Mapping[str, Any]) -> Batch:
        """The batch of the columns' rows.

        Raises:
          DataError: the columns differ in length, or a row cannot be used.
        """
        return self.collate(rows_of_columns(columns))

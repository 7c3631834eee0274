"""Collate pairs, rows or columns into one batch; every callable here can be pickled into a worker process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from easydel.data.batching.packing import Batch, PackingLayout, pack
from easydel.data.faults import DataError, RowFault
from easydel.data.preference.transform import Transform
from easydel.data.tree import PreferencePair


@dataclass(frozen=True)
class Collator:
    """Collate pairs into one batch, by `pack` or by the user's function.

    Args:
      layout: packing of pairs into rows.
      vocab_size: number of tokens of the model.
      data_collator: makes the batch in place of `pack`; None packs.
    """

    layout: PackingLayout
    vocab_size: int
    data_collator: Callable[[Sequence[PreferencePair]], Batch] | None = None

    def __call__(self, pairs: Sequence[PreferencePair]) -> Batch:
        """The batch of the pairs.

        Raises:
          DataError: a token id is outside the vocabulary, or `data_collator` gave a batch that does not hold the pairs,
            or whose number of rows does not fit the devices.
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
    """Refuse pairs with token ids outside the model's vocabulary.

    Raises:
      DataError: there is one; names the row and the id.
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
    """Collate rows into one batch; a row that cannot be used is an error, since nothing counts dropped rows here.

    Example:
      >>> from easydel.data.batching.packing import PackingLayout
      >>> collate = RowCollator(PreferenceTransform(tokenizer), Collator(PackingLayout(0), len(tokenizer)))
      >>> int(collate(rows[:3])["pair_mask"].sum())
      3
    """

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
    """Collate a dict of columns, as TFDS and ``tf.data`` deliver them, into one batch."""

    collate: Callable[[Sequence[Mapping[str, Any]]], Batch]

    def __call__(self, columns: Mapping[str, Any]) -> Batch:
        """The batch of the columns' rows.

        Raises:
          DataError: the columns differ in length, or a row cannot be used.
        """
        return self.collate(rows_of_columns(columns))


def rows_of_columns(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Turn a dict of columns into a list of rows; byte strings become text, arrays lists.

    A column may be a NumPy array, a list, or an object with ``numpy()`` (an eager TensorFlow tensor), and may hold a
    dict of columns in turn (chat messages as TFDS stores them: a sequence of features).

    Raises:
      DataError: the columns differ in length.

    Example:
      >>> rows_of_columns({"chosen": np.array([b"yes", b"no"]), "weight": [1, 2]})
      [{'chosen': 'yes', 'weight': 1}, {'chosen': 'no', 'weight': 2}]
    """
    plain = {name: _column(column) for name, column in columns.items()}
    lengths = {name: len(column) for name, column in plain.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f"the columns of a batch differ in length: {lengths}.")
    return [dict(zip(plain, values)) for values in zip(*plain.values())]


def _column(value: Any) -> Any:
    """A column of a batch, one entry per row."""
    return [_record(row) for row in rows_of_columns(value)] if isinstance(value, Mapping) else _plain(value)


def _record(fields: Mapping[str, Any]) -> Any:
    """Turn a dict of lists into a list of records, such as messages; any other dict is one record already."""
    return rows_of_columns(fields) if fields and all(isinstance(field, list) for field in fields.values()) else fields


def _plain(value: Any) -> Any:
    """The value in Python's own types."""
    if isinstance(value, Mapping):
        return _record({name: _plain(field) for name, field in value.items()})
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    if hasattr(value, "to_list"):  # a ragged tensor
        return _plain(value.to_list())
    array = value.numpy() if hasattr(value, "numpy") else value
    return [_plain(item) for item in (array.tolist() if isinstance(array, np.ndarray) else array)]

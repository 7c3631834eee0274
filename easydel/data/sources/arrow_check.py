"""Check the schema, offsets and sizes in an Arrow or Parquet file before pyarrow relies on them."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc

from easydel.data.faults import DataError

FILE_MAGIC = b"ARROW1"
FILE_START = 8  # the magic and its padding
TEXT = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}


def check_schema(schema: pa.Schema, label: str) -> None:
    """Refuse names of columns, and of fields in them, that are repeated or not UTF-8 text.

    Raises:
      DataError: names the column or field.
    """
    try:
        _check_names(schema, label)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{label} is damaged: the name of a column is not UTF-8 text ({error.reason}). Fetch or write it again."
        ) from error


def _check_names(fields: Iterable[pa.Field], label: str) -> None:
    names: set[str] = set()
    for field in fields:
        if field.name in names:
            raise DataError(f'{label} names the column or field "{field.name}" twice; rename or remove one of the two.')
        names.add(field.name)
        _check_names(_children(field.type), label)


def _children(kind: pa.DataType) -> list[pa.Field]:
    return [kind.field(child) for child in range(kind.num_fields)]


def holds_maps(fields: Iterable[pa.Field]) -> bool:
    """True where a column, or a field in it, is a map."""
    return any(pa.types.is_map(field.type) or holds_maps(_children(field.type)) for field in fields)


def check_batch(batch: pa.RecordBatch, label: str) -> None:
    """Refuse a batch whose offsets, lengths or indices lead out of its buffers.

    Text that is not UTF-8 passes: it is safe to read, and the fault of one row, which is reported when the row is read.

    Raises:
      DataError: the batch is damaged.
    """
    try:
        batch.validate(full=True)
    except pa.ArrowInvalid as error:
        try:
            for column in batch.columns:
                column.view(_without_text(column.type)).validate(full=True)
        except pa.ArrowException:
            raise DataError(
                f"{label} is damaged: {str(error).splitlines()[0]}. Fetch or write the file again."
            ) from error


def _without_text(kind: pa.DataType) -> pa.DataType:
    """The type `kind` with bytes in place of text."""
    if kind in TEXT:
        return TEXT[kind]
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_without_text(field.type)) for field in _children(kind)])
    if pa.types.is_map(kind):
        return pa.map_(_without_text(kind.key_type), _without_text(kind.item_type), keys_sorted=kind.keys_sorted)
    for is_list, make in ((pa.types.is_list, pa.list_), (pa.types.is_large_list, pa.large_list)):
        if is_list(kind):
            return make(kind.value_field.with_type(_without_text(kind.value_type)))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(kind.value_field.with_type(_without_text(kind.value_type)), kind.list_size)
    return kind


def unpacked_size(path: Path) -> int | None:
    """Total unpacked size in bytes that the compressed buffers of an Arrow file declare; None where none is compressed.

    pyarrow allocates the declared size and unpacks a buffer before anyone could check it.

    Raises:
      ArrowInvalid: a message of the file is damaged.
    """
    sizes = None
    with pa.memory_map(str(path)) as mapped:
        is_file = mapped.read(len(FILE_MAGIC)) == FILE_MAGIC
        mapped.seek(FILE_START if is_file else 0)
        for message in pa.ipc.MessageReader.open_stream(mapped):
            if message.body is not None:
                for size in _buffer_sizes(message):
                    sizes = (sizes or 0) + size
    return sizes


def _buffer_sizes(message: pa.ipc.Message) -> Iterator[int]:
    """The declared unpacked size of each compressed buffer of a message.

    References:
      https://arrow.apache.org/docs/format/Columnar.html#encapsulated-message-format and Message.fbs beside it.
    """
    try:
        metadata, body = memoryview(message.metadata), memoryview(message.body)
        batch = _follow(metadata, _field(metadata, _follow(metadata, 0), 2))
        if message.type == "dictionary":
            batch = _follow(metadata, _field(metadata, batch, 1))
        elif message.type != "record batch":
            return
        if not _field(metadata, batch, 3):  # no compression
            return
        buffers = _follow(metadata, _field(metadata, batch, 2))
        (count,) = struct.unpack_from("<I", metadata, buffers)
        for offset, length in struct.iter_unpack("<qq", metadata[buffers + 4 : buffers + 4 + 16 * count]):
            if length:
                (unpacked,) = struct.unpack_from("<q", body, offset)
                yield length if unpacked < 0 else unpacked  # -1: this buffer was not worth compressing
    except (struct.error, ValueError) as error:
        raise pa.ArrowInvalid(f"a message cannot be read: {error}") from error


def _field(metadata: memoryview, table: int, number: int) -> int:
    """The position of field `number` of a flatbuffer table; 0 where the table leaves it out."""
    (back,) = struct.unpack_from("<i", metadata, table)
    (size,) = struct.unpack_from("<H", metadata, table - back)
    slot = 4 + 2 * number
    (offset,) = struct.unpack_from("<H", metadata, table - back + slot) if slot < size else (0,)
    return table + offset if offset else 0


def _follow(metadata: memoryview, position: int) -> int:
    """The position that the offset at a position points to."""
    (offset,) = struct.unpack_from("<I", metadata, position)
    return position + offset

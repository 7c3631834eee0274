"""Read the header of a ``.gguf`` file: its metadata, and the shape, type and offset of each tensor."""

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from easydel.errors import plain, shown
from easydel.infra.config_keys import Key

_MAX_DIMENSIONS = 4
_MAX_VALUES = 1 << 24  # of one list; the largest vocabularies have some 260 000 tokens
_MAX_ALIGNMENT = 1 << 20
_SCALAR_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_FLOAT32, _STRING, _ARRAY = 6, 8, 9


def _is_whole(value: Any, least: int = 0, most: int = (1 << 31) - 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0


COUNT = Key(expected="a whole number of at least 0", accepts=_is_whole)
SIZE = Key(expected="a positive whole number", accepts=lambda value: _is_whole(value, 1))
SIZES = Key(
    expected="a whole number of at least 0, or one a layer",
    accepts=lambda value: all(map(_is_whole, value if isinstance(value, list) else [value])),
)
ALIGNMENT = Key(
    expected=f"a positive integer of at most {_MAX_ALIGNMENT}",
    accepts=lambda value: _is_whole(value, 1, _MAX_ALIGNMENT),
)
NUMBER = Key(expected="a finite number above 0", accepts=_is_number)
TEXT = Key(expected="text", accepts=lambda value: isinstance(value, str))
FLAG = Key(expected="true or false", accepts=lambda value: isinstance(value, bool))
TEXTS = Key(
    expected="a list of texts",
    accepts=lambda value: isinstance(value, list) and all(isinstance(one, str) for one in value),
)
NUMBERS = Key(
    expected="a list of whole numbers",
    accepts=lambda value: isinstance(value, list) and all(map(_is_whole, value)),
)


def checked(path: Path, key: str, value: Any, kind: Key) -> Any:
    """The value of a metadata key, checked.

    Raises:
      ValueError: the value is not one that `kind` accepts.
    """
    if not kind.accepts(value):
        raise ValueError(f"{path}: {plain(key)}={shown(value)}, expected {kind.expected}; the file is damaged.")
    return value


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """Shape in numpy order, ggml type number, and first byte in the file, of one tensor."""

    shape: tuple[int, ...]
    ggml_type: int
    offset: int


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """The metadata and tensor list that precede the weights in a GGUF file."""

    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]


class _HeaderReader:
    """A position in the header; every read checks that the file is long enough."""

    # The gguf package's own reader makes one numpy array per token and merge: seconds, where this takes a fraction.
    def __init__(self, path: Path, data: memoryview) -> None:
        self.path, self.data, self.position = path, data, 0

    def take(self, size: int) -> memoryview:
        start, end = self.position, self.position + size
        self.require(size)
        self.position = end
        return self.data[start:end]

    def require(self, size: int) -> None:
        """Refuse a file that ends before the next `size` bytes."""
        end = self.position + size
        if end > len(self.data):
            raise ValueError(
                f"{self.path} is truncated: its header needs byte {end}, the file has {len(self.data)}. Fetch it again."
            )

    def scalar(self, code: str) -> Any:
        layout = struct.Struct("<" + code)
        return layout.unpack(self.take(layout.size))[0]

    def string(self) -> str:
        start = self.position
        try:
            return str(self.take(self.scalar("Q")), "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path}: the string at byte {start} is not UTF-8; the file is damaged.") from error

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        if kind not in _SCALAR_FORMATS:
            raise ValueError(f"{self.path}: unknown value type {kind} near byte {self.position}; the file is damaged.")
        value = self.scalar(_SCALAR_FORMATS[kind])
        # The shortest decimal of the float32: 1e-05 as its writer meant, not 9.999999747378752e-06.
        return float(str(np.float32(value))) if kind == _FLOAT32 else value

    def array(self) -> list[Any]:
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind == _ARRAY:
            raise ValueError(
                f"{self.path}: the list near byte {self.position} holds lists, which no model file needs; the file is "
                "damaged."
            )
        if count > _MAX_VALUES:
            raise ValueError(
                f"{self.path}: the list near byte {self.position} has {count} values, expected at most {_MAX_VALUES}; "
                "the file is damaged."
            )
        if kind not in _SCALAR_FORMATS:
            # Each string takes at least the 8 bytes of its length: refuse an impossible count before building a list.
            self.require(8 * count)
            return [self.value(kind) for _ in range(count)]
        item = np.dtype(_SCALAR_FORMATS[kind]).newbyteorder("<")
        return np.frombuffer(self.take(count * item.itemsize), item).tolist()


def read_header(path: str | os.PathLike[str]) -> GGUFHeader:
    """Read the metadata and the tensor list of a GGUF file, version 2 or 3, little-endian.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not a GGUF file, is of another version or byte order, is truncated or damaged, or is one part
        of a split model.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; expected a .gguf model file.")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ValueError(f"{path} is not a GGUF file: it starts with {magic!r}, expected b'GGUF'.")
    reader = _HeaderReader(path, np.memmap(path, mode="r").data)
    reader.take(4)
    version = reader.scalar("I")
    if version not in (2, 3):
        # A version above 65535 is a small one with its bytes swapped.
        found = "big-endian" if version >> 16 else f"GGUF version {version}"
        raise ValueError(f"{path} is {found}; expected little-endian version 2 or 3. Convert the model again.")
    tensor_count, metadata_count = reader.scalar("Q"), reader.scalar("Q")

    metadata: dict[str, Any] = {}
    for _ in range(metadata_count):
        key = reader.string()
        if key in metadata:
            raise ValueError(f"{path} has {plain(key)} twice; the file is damaged.")
        metadata[key] = reader.value(reader.scalar("I"))
    parts = checked(path, "split.count", metadata.get("split.count", 0), COUNT)
    if parts > 1:
        part = checked(path, "split.no", metadata.get("split.no", 0), COUNT) + 1
        raise ValueError(
            f"{path} is part {part} of {parts} of a split model. "
            "Join the parts first: llama-gguf-split --merge FIRST_PART OUTPUT."
        )

    entries: list[tuple[str, tuple[int, ...], int, int]] = []
    for _ in range(tensor_count):
        name, rank = reader.string(), reader.scalar("I")
        if not 1 <= rank <= _MAX_DIMENSIONS:
            raise ValueError(
                f"{path}: tensor {plain(name)} has {rank} dimensions, expected 1 to {_MAX_DIMENSIONS}; "
                "the file is damaged."
            )
        shape = tuple(reversed([reader.scalar("Q") for _ in range(rank)]))
        if 0 in shape:
            raise ValueError(f"{path}: tensor {plain(name)} has shape {shape}, without values; the file is damaged.")
        entries.append((name, shape, reader.scalar("I"), reader.scalar("Q")))
    alignment = metadata.get("general.alignment", 32)
    checked(path, "general.alignment", alignment, ALIGNMENT)
    start = -(-reader.position // alignment) * alignment
    tensors = {name: GGUFTensor(shape, kind, start + offset) for name, shape, kind, offset in entries}
    if len(tensors) != len(entries):
        raise ValueError(f"{path} names a tensor twice; the file is damaged.")
    return GGUFHeader(metadata, tensors)

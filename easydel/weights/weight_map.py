"""Map a model's arrays to the tensors of a Hugging Face folder, and back.

A family lists one `TensorRule` for each kind of tensor. The rules give the slices of tensors that fill a slice of an
array (loading), the arrays that make a tensor (saving), and the name of each module (adapters).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

LAYER, EXPERT = "{layer}", "{expert}"
Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
Slices = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class TensorRule:
    """The arrays that make one kind of tensor.

    A *block* is the slice of an array that belongs to one tensor: the array without the leading axes that stand for the
    placeholders of the tensor's name. An array ``[layers, experts, out, in]`` and the name
    ``model.layers.{layer}.mlp.experts.{expert}.up_proj.weight`` have blocks ``[out, in]``; where the file stacks the
    experts itself (``model.layers.{layer}.mlp.experts.up_proj``), they are ``[experts, out, in]``.

    Attributes:
      tensor: name in the folder, with ``{layer}`` and ``{expert}`` where there is one tensor for each.
      arrays: paths of the arrays; several are joined along `axis`, in this order. An empty tuple takes the tensor's own
        name as the path.
      layers: the layers that the arrays belong to: a tuple for arrays stacked over those layers in that order, a number
        for arrays of one layer without an axis for it, None for arrays outside the layers.
      axis: the axis of the block along which several arrays are joined.
      interleaved: entries of the arrays take turns along `axis`, rather than one array following the other.
      transposed: the file swaps the last two axes of the block.

    Example:
      >>> rule = TensorRule("self_attn.qkv_proj.weight", ("self_attn.q_proj.weight", "self_attn.k_proj.weight"))
      >>> rule.under(arrays="layers", tensors="model.layers.{layer}", layers=(0, 2)).tensor
      'model.layers.{layer}.self_attn.qkv_proj.weight'
    """

    tensor: str
    arrays: tuple[str, ...] = ()
    layers: tuple[int, ...] | int | None = None
    axis: int = 0
    interleaved: bool = False
    transposed: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "arrays", tuple(self.arrays) or (self.tensor,))

    def under(self, arrays: str, tensors: str, layers: Sequence[int] | int | None = None) -> TensorRule:
        """The same rule for a module inside a model.

        Args:
          arrays: path of the module in the model.
          tensors: its name in the folder.
          layers: as the attribute, where the module is one of the decoder layers.
        """
        return dataclasses.replace(
            self,
            tensor=f"{tensors}.{self.tensor}",
            arrays=tuple(f"{arrays}.{path}" for path in self.arrays),
            layers=layers if layers is None or isinstance(layers, int) else tuple(layers),
        )

    def stacked_axes(self) -> int:
        """Number of leading axes of the arrays that stand for placeholders of the name."""
        return isinstance(self.layers, tuple) + (EXPERT in self.tensor)

    def name(self, position: Sequence[int]) -> str:
        """The tensor's name at a position in the leading axes."""
        positions = list(position)
        layer = self.layers[positions.pop(0)] if isinstance(self.layers, tuple) else self.layers
        return self.tensor.replace(LAYER, str(layer)).replace(EXPERT, str(positions[0] if positions else ""))

    def tensor_shape(self, blocks: Sequence[Shape]) -> Shape:
        """Shape of a tensor made of blocks of these shapes."""
        shape = list(blocks[0])
        if len(blocks) > 1:
            shape[self.axis] = sum(block[self.axis] for block in blocks)
        return tuple(self._swapped(shape))

    def source(self, number: int, blocks: Sequence[Shape], part: Slices) -> Slices:
        """The slices of the tensor that hold a part of the block of one array.

        Args:
          number: index of the array in `arrays`.
          blocks: shapes of the blocks of all arrays.
          part: one slice per axis of the block, each with a start and a stop.
        """
        slices = list(part)
        if len(blocks) > 1:
            start, stop = slices[self.axis].start, slices[self.axis].stop
            if self.interleaved:
                step = len(blocks)
                slices[self.axis] = slice(number + step * start, number + step * (stop - 1) + 1, step)
            else:
                before = sum(block[self.axis] for block in blocks[:number])
                slices[self.axis] = slice(before + start, before + stop)
        return tuple(self._swapped(slices))

    def joined(self, blocks: Sequence[np.ndarray]) -> np.ndarray:
        """The tensor that blocks make, one block per array."""
        tensor = blocks[0]
        if len(blocks) > 1 and self.interleaved:
            tensor = np.stack(blocks, self.axis + 1)
            tensor = tensor.reshape(self.tensor_shape([block.shape for block in blocks][:1] * len(blocks)))
        elif len(blocks) > 1:
            tensor = np.concatenate(blocks, self.axis)
        return np.ascontiguousarray(tensor.swapaxes(-1, -2)) if self.transposed else tensor

    def _swapped(self, items: Sequence[Any]) -> Sequence[Any]:
        return [*items[:-2], items[-1], items[-2]] if self.transposed else items


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of one tensor that fills a part of an array.

    Attributes:
      tensor: name of the tensor.
      source: the part of it, one slice per axis; a step other than 1 skips the entries of other arrays.
      target: position in the leading axes of the slice of the array that is filled.
      transposed: swap the last two axes after reading.
    """

    tensor: str
    source: Slices
    target: tuple[int, ...]
    transposed: bool

    def read(self, read: Callable[[str, Slices], np.ndarray]) -> np.ndarray:
        """The values of the piece.

        Args:
          read: gets a tensor's name and one slice of step 1 per axis; returns those values.
        """
        values = read(self.tensor, tuple(slice(part.start, part.stop) for part in self.source))
        values = values[tuple(slice(None, None, part.step) for part in self.source)]
        return values.swapaxes(-1, -2) if self.transposed else values


@dataclasses.dataclass(frozen=True)
class SavedTensor:
    """A tensor to save, whose values are fetched only when they are written.

    Attributes:
      shape: of the tensor.
      dtype: of the values on disk.
      read: fetches the values.
    """

    shape: Shape
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Size on disk, in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class Module(NamedTuple):
    """The module of the folder that holds a linear layer, and the layer's rows in it.

    Attributes:
      name: of the module, e.g. "model.layers.3.self_attn.qkv_proj".
      rows: rows of the module's weight that are the layer's.
      size_out: number of rows of the module's weight.
    """

    name: str
    rows: slice
    size_out: int


class WeightMap:
    """The rules of a model, by the paths of its arrays and by the names of its tensors.

    Rules of arrays that a model lacks (biases, the head of a tied model) stay unused.

    Args:
      rules: one for each kind of tensor.
      others: regular expression for the names of tensors of other parts of a folder, such as a vision tower: loading
        ignores them and saving keeps them. None where a folder holds the language model alone.

    Raises:
      ValueError: two rules fill one array.

    Example:
      >>> weight_map = WeightMap([TensorRule("model.layers.{layer}.up.weight", ("layers.up.weight",), layers=(0, 1))])
      >>> weight_map.tensor_shapes({"layers.up.weight": (2, 8, 4)})
      {'model.layers.0.up.weight': (8, 4), 'model.layers.1.up.weight': (8, 4)}
    """

    def __init__(self, rules: Iterable[TensorRule], others: str | None = None):
        self.rules = tuple(rules)
        self._others = None if others is None else re.compile(others)
        self._rule_of: dict[str, TensorRule] = {}
        for rule in self.rules:
            for path in rule.arrays:
                if path in self._rule_of:
                    raise ValueError(f"{path} is filled by {self._rule_of[path].tensor} and by {rule.tensor}.")
                self._rule_of[path] = rule

    def wrapped(self, prefixes: Mapping[str, str]) -> WeightMap:
        """The same arrays in a folder that holds other parts too, whose tensors are kept on saving.

        Args:
          prefixes: start of names in a plain folder -> their start in this one, e.g.
            ``{"model.": "language_model.model.", "lm_head.": "language_model.lm_head."}``. All other names belong to
            other parts.

        Raises:
          ValueError: a rule's tensor begins with none of the prefixes.
        """

        def renamed(rule: TensorRule) -> TensorRule:
            for old, new in prefixes.items():
                if rule.tensor.startswith(old):
                    return dataclasses.replace(rule, tensor=new + rule.tensor.removeprefix(old))
            raise ValueError(f"{rule.tensor} begins with none of {', '.join(prefixes)}.")

        return WeightMap(map(renamed, self.rules), f"(?!{'|'.join(map(re.escape, prefixes.values()))})")

    @property
    def is_wrapped(self) -> bool:
        """Whether the folder may hold tensors of other parts."""
        return self._others is not None

    def is_other(self, tensor: str) -> bool:
        """Whether a tensor of the folder belongs to another part of it."""
        return self._others is not None and self._others.match(tensor) is not None

    def rule(self, path: str) -> TensorRule:
        """The rule of an array.

        Raises:
          KeyError: no rule fills it.
        """
        if path not in self._rule_of:
            raise KeyError(f"no rule of the weight map fills {path}; add a TensorRule for it.")
        return self._rule_of[path]

    def __contains__(self, path: str) -> bool:
        return path in self._rule_of

    def is_in_layers(self, path: str) -> bool:
        """Whether an array belongs to decoder layers, rather than to the embedding, the last norm or the head."""
        return path in self._rule_of and self._rule_of[path].layers is not None

    def tensor_shapes(self, shapes: Shapes) -> dict[str, Shape]:
        """The tensors that arrays of these shapes make: name -> shape.

        Raises:
          KeyError: no rule fills an array, or one of several that make a tensor is missing.
          ValueError: an array is stacked over another number of layers than its rule has.
        """
        return {
            rule.name(position): rule.tensor_shape([shape[rule.stacked_axes() :] for shape in parts])
            for rule, parts in self._used(shapes)
            for position in self._positions(rule, parts[0])
        }

    def pieces(self, path: str, index: Slices, shapes: Shapes) -> Iterator[Piece]:
        """The pieces that fill a slice of an array, one per tensor.

        Args:
          path: of the array.
          index: one slice per axis, each of step 1.
          shapes: of all arrays.
        """
        rule = self.rule(path)
        axes = rule.stacked_axes()
        ranges = [range(*part.indices(size)) for part, size in zip(index, shapes[path])]
        part = tuple(slice(positions.start, positions.stop) for positions in ranges[axes:])
        source = rule.source(rule.arrays.index(path), [shapes[other][axes:] for other in rule.arrays], part)
        for position in itertools.product(*ranges[:axes]):
            target = tuple(at - positions.start for at, positions in zip(position, ranges))
            yield Piece(rule.name(position), source, target, rule.transposed)

    def tensors(self, arrays: Mapping[str, Any], dtype: np.dtype | None = None) -> dict[str, SavedTensor]:
        """The tensors that a model's arrays make, by name, each fetched from the devices when it is read.

        Args:
          arrays: path -> array.
          dtype: of the tensors; None keeps the arrays' own.
        """
        tensors: dict[str, SavedTensor] = {}
        shapes = {path: tuple(array.shape) for path, array in arrays.items()}
        names = self.tensor_shapes(shapes)
        for rule, parts in self._used(shapes):
            held = [arrays[path] for path in rule.arrays]
            of_rule = np.dtype(held[0].dtype) if dtype is None else dtype
            for position in self._positions(rule, parts[0]):
                read = functools.partial(_joined, rule, held, position, of_rule)
                tensors[rule.name(position)] = SavedTensor(names[rule.name(position)], of_rule, read)
        return tensors

    def modules(self, path: str, shapes: Shapes) -> dict[tuple[int, ...], Module]:
        """The folder's modules that hold a linear layer, by position in the leading axes of its weight.

        Args:
          path: of the linear layer.
          shapes: array path -> shape, of the weights of all linear layers.

        Returns:
          An empty dict where the folder does not hold the weight as matrices ``[out, in]``.
        """
        rule, shape = self.rule(f"{path}.weight"), shapes[f"{path}.weight"]
        axes = rule.stacked_axes()
        if rule.transposed or len(shape) != axes + 2 or not rule.tensor.endswith(".weight"):
            return {}
        blocks = [shapes[other][axes:] for other in rule.arrays]
        rows, _ = rule.source(
            rule.arrays.index(f"{path}.weight"), blocks, tuple(slice(0, size) for size in shape[axes:])
        )
        size_out, _ = rule.tensor_shape(blocks)
        return {
            at: Module(rule.name(at).removesuffix(".weight"), rows, size_out) for at in self._positions(rule, shape)
        }

    def _used(self, shapes: Shapes) -> Iterator[tuple[TensorRule, list[Shape]]]:
        """The rules of the given arrays, each with the shapes of its arrays, in the order of the arrays."""
        for rule in dict.fromkeys(self.rule(path) for path in shapes):
            if missing := [path for path in rule.arrays if path not in shapes]:
                raise KeyError(f"{rule.tensor} is made of {', '.join(missing)} too, which the model does not have.")
            parts = [shapes[path] for path in rule.arrays]
            for path, shape in zip(rule.arrays, parts):
                if isinstance(rule.layers, tuple) and shape[0] != len(rule.layers):
                    raise ValueError(f"{path} has shape {shape}, expected {len(rule.layers)} layers: {rule.layers}.")
            yield rule, parts

    def _positions(self, rule: TensorRule, shape: Shape) -> Iterator[tuple[int, ...]]:
        """Every position in the leading axes of an array of this shape."""
        return itertools.product(*map(range, shape[: rule.stacked_axes()]))


def _joined(rule: TensorRule, arrays: Sequence[Any], position: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    # Index on the device: a copy of the whole array on the host would live as long as the array.
    blocks = [np.asarray(array[position] if position else array) for array in arrays]
    return rule.joined(blocks).astype(dtype, copy=False)


def linear(tensor: str, path: str = "") -> tuple[TensorRule, ...]:
    """The rules of a linear layer: its weight and, where the model has one, its bias.

    Args:
      tensor: name of the layer in the folder.
      path: of the layer in the model; "" is the same as `tensor`.
    """
    return tuple(TensorRule(f"{tensor}.{kind}", (f"{path or tensor}.{kind}",)) for kind in ("weight", "bias"))


def fused_linear(tensor: str, paths: Sequence[str]) -> tuple[TensorRule, ...]:
    """The rules of several linear layers that the file holds as one, with their outputs one after the other.

    Example:
      >>> [rule.tensor for rule in fused_linear("mlp.gate_up_proj", ["mlp.gate_proj", "mlp.up_proj"])]
      ['mlp.gate_up_proj.weight', 'mlp.gate_up_proj.bias']
    """
    return tuple(
        TensorRule(f"{tensor}.{kind}", tuple(f"{path}.{kind}" for path in paths)) for kind in ("weight", "bias")
    )

"""Which parameters an update changes: the adapters of a model that has some, else all."""

from __future__ import annotations

from typing import TypeVar

import equinox as eqx
import jax
from jaxtyping import PyTree

from easydel.layers.linear import LoraAdapter

Tree = TypeVar("Tree", bound=PyTree)


def trainable_filter(model: PyTree) -> PyTree[bool]:
    """True or False for every array of a model, in the model's own structure."""

    def is_adapter(node: PyTree) -> bool:
        return isinstance(node, LoraAdapter)

    if not any(map(is_adapter, jax.tree.leaves(model, is_leaf=is_adapter))):
        return jax.tree.map(lambda _: True, model)
    return jax.tree.map(lambda node: jax.tree.map(lambda _: is_adapter(node), node), model, is_leaf=is_adapter)


def split_trainable(model: Tree) -> tuple[Tree, Tree]:
    """``(trainable, frozen)``: the model twice, None in place of the other part's arrays; `join` undoes it."""
    return eqx.partition(model, trainable_filter(model))


def join(trainable: Tree, frozen: Tree) -> Tree:
    """The whole model from the two parts of `split_trainable`."""
    return eqx.combine(trainable, frozen)


def copy_trainable(model: Tree) -> Tree:
    """The model with trainable arrays of its own; the frozen ones are shared."""
    trainable, frozen = split_trainable(model)
    return join(jax.tree.map(lambda array: array.copy(), trainable), frozen)

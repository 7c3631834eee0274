"""Find the linear layers of a model by their paths, and replace them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jaxtyping import PyTree

from easydel.infra.language_model import LanguageModel
from easydel.infra.mesh import mesh_of, parameter_path, parameter_sharding
from easydel.layers.linear import Linear
from easydel.layers.name_pattern import matching_names

Model = TypeVar("Model", bound=LanguageModel)
PyTreeT = TypeVar("PyTreeT", bound=PyTree)


def layer_linears(model: LanguageModel) -> dict[str, Linear]:
    """Every linear layer of the decoder layers by its path, e.g. "layers.self_attn.q_proj"; the head is left out."""
    weight_map = model.weight_map
    nodes = jax.tree_util.tree_flatten_with_path(model, is_leaf=_is_linear)[0]
    linears = {parameter_path(path): node for path, node in nodes if _is_linear(node)}
    return {path: linear for path, linear in linears.items() if weight_map.is_in_layers(f"{path}.weight")}


def matching_linears(model: LanguageModel, pattern: str | None) -> dict[str, Linear]:
    """The linear layers of the decoder layers in whose path `pattern` is found; None takes all.

    Raises:
      ValueError: there are none (the error lists the paths), or `pattern` is no regular expression.
    """
    linears = layer_linears(model)
    if pattern is None:
        return linears
    found = {path: linears[path] for path in matching_names(pattern, linears, whole=False)}
    if not found:
        raise ValueError(f"pattern={pattern!r} matches none of the layers; there are {', '.join(linears)}.")
    return found


def map_linears(model: Model, change: Callable[[str, Linear], Linear]) -> Model:
    """The model with every linear layer, the head too, replaced by ``change(path, layer)``."""
    return jax.tree_util.tree_map_with_path(
        lambda path, node: change(parameter_path(path), node) if _is_linear(node) else node, model, is_leaf=_is_linear
    )


def placed(tree: PyTreeT, path: str, model: LanguageModel) -> PyTreeT:
    """New parameters for the path `path` of a model, laid out by its rule table where the model lies on a mesh."""
    mesh, rules = mesh_of(model), model.partition_rules
    if mesh is None:
        return tree
    return jax.tree_util.tree_map_with_path(
        lambda end, leaf: jax.device_put(
            leaf, parameter_sharding(".".join(filter(None, (path, parameter_path(end)))), leaf.shape, rules, mesh)
        ),
        tree,
    )


def _is_linear(node: Any) -> bool:
    return isinstance(node, Linear)

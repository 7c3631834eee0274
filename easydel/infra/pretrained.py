"""From files to a sharded model and back."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from jax.sharding import Mesh
from jaxtyping import PyTree

from easydel.infra.adapter_files import ADAPTER_CONFIG, is_adapter_folder
from easydel.infra.checkpoint_files import CheckpointFiles, SafetensorsFolder
from easydel.infra.gguf import GGUFCheckpoint
from easydel.infra.mesh import PartitionRules, parameter_path, parameter_sharding
from easydel.infra.problems import listed

Tree = TypeVar("Tree", bound=PyTree)
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]


def local_path(name_or_path: str | Path) -> Path:
    """A local model folder or ``.gguf`` file: the path itself, or the snapshot of a hub id.

    Raises:
      FileNotFoundError: no such path, and no such hub id can be reached.
    """
    path = Path(name_or_path).expanduser()
    if path.exists():
        return path
    name = str(name_or_path)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith((".", "/")):
        raise FileNotFoundError(f'"{name}" is neither a folder, a .gguf file nor a hub id such as "org/model".')
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f'"{name}" is no local folder, and the hub did not give it ({type(error).__name__}). '
            "Check the name and the connection, or pass the folder of a downloaded model."
        ) from error


def open_checkpoint(name_or_path: str | Path) -> CheckpointFiles:
    """The tensors and ``config.json`` of a Hugging Face folder, a hub id or a ``.gguf`` file."""
    path = local_path(name_or_path)
    if is_adapter_folder(path):
        raise ValueError(
            f"{path} holds an adapter ({ADAPTER_CONFIG}), not a model: load the model it was made for and call its "
            "load_adapter with this folder. AutoEasyDeLModelForCausalLM does both where the adapter names its model."
        )
    if path.is_dir():
        return SafetensorsFolder(path)
    if path.suffix == ".gguf":
        return GGUFCheckpoint(path)
    raise ValueError(f"{path} is a {path.suffix or 'plain'} file; expected a Hugging Face folder or a .gguf file.")


def load_parameters(
    files: CheckpointFiles,
    skeleton: Tree,
    tensor_names: Mapping[str, str],
    rules: PartitionRules,
    mesh: Mesh,
    param_dtype: np.dtype,
) -> Tree:
    """Fill a skeleton of shapes from files; each device reads its own slices and nothing more.

    Args:
      files: where the tensors are.
      skeleton: the model with `jax.ShapeDtypeStruct` leaves.
      tensor_names: our parameter path -> Hugging Face name, with ``{layer}`` where ours is stacked over layers.
      rules: parameter path -> partition.
      mesh: the devices.
      param_dtype: dtype of the parameters in memory.

    Raises:
      ValueError: lists every missing, surplus and mis-shaped tensor.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(skeleton)
    _check_tensors(files, {parameter_path(path): leaf.shape for path, leaf in leaves}, tensor_names)

    def load(path: str, shape: tuple[int, ...]) -> jax.Array:
        name = tensor_names[path]

        def read(index: tuple[slice, ...] | None) -> np.ndarray:
            index = index or (slice(None),) * len(shape)
            if "{layer}" not in name:
                return files.read(name, index).astype(param_dtype)
            layers = range(*index[0].indices(shape[0]))
            return np.stack([files.read(name.format(layer=layer), index[1:]).astype(param_dtype) for layer in layers])

        return jax.make_array_from_callback(shape, parameter_sharding(path, shape, rules, mesh), read)

    return jax.tree_util.tree_unflatten(treedef, [load(parameter_path(path), leaf.shape) for path, leaf in leaves])


def _check_tensors(
    files: CheckpointFiles, shapes: Mapping[str, tuple[int, ...]], tensor_names: Mapping[str, str]
) -> None:
    expected: dict[str, tuple[int, ...]] = {}
    for path, shape in shapes.items():
        name = tensor_names[path]
        if "{layer}" in name:
            expected |= {name.format(layer=layer): shape[1:] for layer in range(shape[0])}
        else:
            expected[name] = shape
    present = set(files.tensor_names)
    # Old exports carry the rotary table, and tied models a copy of the embedding as head: both follow from the rest.
    implied = {name for name in present if name.endswith("rotary_emb.inv_freq")}
    if "lm_head.weight" not in expected:
        implied.add("lm_head.weight")
    problems = [f"tensor {name} is missing" for name in sorted(expected.keys() - present)]
    problems += [f"tensor {name} is not part of this model" for name in sorted(present - expected.keys() - implied)]
    problems += [
        f"tensor {name} has shape {files.shape(name)}, expected {shape} from config.json"
        for name, shape in expected.items()
        if name in present and files.shape(name) != shape
    ]
    if problems:
        raise ValueError(
            f"the weights do not fit config.json (model_type {json.dumps(files.config.get('model_type'))}):\n  "
            f"{listed(problems)}"
        )


def named_tensors(model: PyTree, tensor_names: Mapping[str, str], dtype: np.dtype | None) -> dict[str, np.ndarray]:
    """Every parameter on the host under its Hugging Face name, layers unstacked."""
    tensors: dict[str, np.ndarray] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(model)[0]:
        name = tensor_names[parameter_path(path)]
        array = np.asarray(leaf) if dtype is None else np.asarray(leaf).astype(dtype)
        if "{layer}" in name:
            tensors |= {name.format(layer=layer): array[layer] for layer in range(array.shape[0])}
        else:
            tensors[name] = array
    return tensors

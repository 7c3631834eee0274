"""Load a model's parameters from its files, each device its own slices, and collect the tensors to save."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from jax.sharding import Mesh
from jaxtyping import PyTree

from easydel.errors import listed, plain, shown
from easydel.infra.mesh import PartitionRules, parameter_path, parameter_sharding
from easydel.paths import HUB_ID
from easydel.weights.gguf.checkpoint import GGUFCheckpoint
from easydel.weights.hugging_face import KEPT_FILES, CheckpointFiles, SafetensorsFolder
from easydel.weights.peft_config import ADAPTER_CONFIG, is_adapter_folder
from easydel.weights.weight_map import SavedTensor, Shape, WeightMap

PyTreeT = TypeVar("PyTreeT", bound=PyTree)
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", *KEPT_FILES]
# Other copies of the same weights: the original authors' format, and subfolders of any kind.
HUB_FILES_NOT_READ = ["consolidated*", "*/*"]
HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"  # paths of the arrays that a tied model has as one
ROWS_AT_ONCE = 8192
FLOAT_TYPES = ("float32", "bfloat16", "float16")
# Training uses these alone: float16 ends at 65504 and 6e-8, and losses are not scaled here.
TRAINABLE_TYPES = ("float32", "bfloat16")


def local_path(name_or_path: str | Path) -> Path:
    """A local model folder or ``.gguf`` file: the path itself, or the snapshot of a hub id.

    Raises:
      FileNotFoundError: there is no such path, and the hub does not give a model of that name.
    """
    name = str(name_or_path)
    try:
        path = Path(name_or_path).expanduser()
        exists = bool(name) and path.exists()
    except (OSError, ValueError, RuntimeError):  # too long, a zero byte, the home of an unknown user
        exists = False
    if exists:
        return path
    if not HUB_ID.fullmatch(name):
        raise FileNotFoundError(f'"{plain(name)}" is neither a folder, a .gguf file nor a hub id such as "org/model".')
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns=HUB_FILES_NOT_READ))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f'"{plain(name)}" is no local folder, and the hub did not give it ({type(error).__name__}). '
            "Check the name and the connection, or pass the folder of a downloaded model."
        ) from error


def open_checkpoint(name_or_path: str | Path) -> CheckpointFiles:
    """Open the tensors and ``config.json`` of a Hugging Face folder, a hub id or a ``.gguf`` file.

    Raises:
      FileNotFoundError: there is no such model, or a file of it is missing.
      ValueError: the path holds an adapter or another kind of file, or its files are damaged.
    """
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


def float_dtype(name: str, value: Any) -> np.dtype:
    """A dtype that models can have, from its name or from a type of numpy or jax.

    Args:
      name: of the option, for the error.
      value: "float32", "bfloat16" or "float16", or their types; "float64" where jax computes in it.

    Raises:
      ValueError: it is another dtype, or none at all.

    Example:
      >>> float_dtype("dtype", "bfloat16")
      dtype(bfloat16)
    """
    try:
        dtype = np.dtype(jnp.dtype(value)) if value is not None else None
    except (TypeError, ValueError):
        dtype = None
    if dtype is not None and str(dtype) in (*FLOAT_TYPES, str(jax.dtypes.canonicalize_dtype(np.float64))):
        return dtype
    given = shown(value) if isinstance(value, str) else str(dtype or value)[:60]
    more = " float64 needs jax_enable_x64." if dtype == np.float64 else ""
    raise ValueError(f"{name}={given}, expected one of {', '.join(FLOAT_TYPES)}.{more}")


def load_parameters(
    files: CheckpointFiles,
    skeleton: PyTreeT,
    weight_map: WeightMap,
    rules: PartitionRules,
    mesh: Mesh,
    param_dtype: np.dtype,
) -> PyTreeT:
    """Fill a skeleton of shapes from files; each device reads only its own slices.

    Args:
      files: the tensors.
      skeleton: the model with `jax.ShapeDtypeStruct` leaves.
      weight_map: which tensors fill which arrays.
      rules: sharding of every parameter by its path.
      mesh: the devices.
      param_dtype: dtype of the parameters in memory.

    Raises:
      ValueError: tensors are missing, surplus or mis-shaped (the error lists them), a tensor holds NaN or infinity, or
        a tied model has a head that differs from its embedding.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(skeleton)
    shapes = {parameter_path(path): leaf.shape for path, leaf in leaves}
    _check_tensors(files, shapes, weight_map)

    def load(path: str, shape: Shape) -> jax.Array:
        def read(index: tuple[slice, ...] | None) -> np.ndarray:
            index = index or (slice(None),) * len(shape)
            ranges = (range(*part.indices(size)) for part, size in zip(index, shape))
            # Fill piece by piece: memory holds a device's slice, and one tensor's share of it.
            values = np.empty([len(positions) for positions in ranges], param_dtype)
            for piece in weight_map.pieces(path, index, shapes):
                values[piece.target] = _finite(piece.tensor, piece.read(files.read).astype(param_dtype, copy=False))
            return values

        return jax.make_array_from_callback(shape, parameter_sharding(path, shape, rules, mesh), read)

    return jax.tree_util.tree_unflatten(treedef, [load(parameter_path(path), leaf.shape) for path, leaf in leaves])


def check_layer_count(files: CheckpointFiles, prefix: str) -> None:
    """Compare the number of layers in ``config.json`` with the tensors' names, before a list of that length is made.

    Args:
      files: the tensors and the config.
      prefix: start of the names of a layer's tensors, before its number, e.g. "model.layers.".

    Raises:
      ValueError: they differ; names both.
    """
    layer = re.compile(f"{re.escape(prefix)}([0-9]+)[.]")
    held = {match[1] for match in map(layer.match, files.tensor_names) if match}
    said = files.config.get("num_hidden_layers")
    if isinstance(said, int) and not isinstance(said, bool) and said != len(held):
        raise ValueError(
            f'config.json has "num_hidden_layers": {shown(said)}, but the weights hold {len(held)} layers (named '
            f"{prefix}N, N from 0)."
        )


def _finite(name: str, array: np.ndarray) -> np.ndarray:
    """The array itself, whose every entry is a finite number; else a `ValueError`."""
    # A finite sum proves finite entries in a third of the time of testing each; entries are tested where it overflows.
    with np.errstate(over="ignore", invalid="ignore"):
        is_finite = np.isfinite(array.sum(dtype=np.float32))
    if not is_finite and (count := int((~np.isfinite(array)).sum())):
        raise ValueError(
            f"tensor {name} holds NaN or infinity as {array.dtype} ({count} of {array.size} entries): they are damaged"
            f"{', or too large for float16' if array.dtype == np.float16 else ''}."
        )
    return array


def _check_tied_head(files: CheckpointFiles, head: str, embedding: str) -> None:
    """Refuse a tied model whose file has a head that differs from the embedding.

    transformers 4 ignores such a head and transformers 5 uses it; a copy of the embedding is fine.
    """
    shape = files.shape(embedding)
    rows = [
        (slice(start, min(start + ROWS_AT_ONCE, shape[0])), slice(None)) for start in range(0, shape[0], ROWS_AT_ONCE)
    ]
    if files.shape(head) != shape or not all(
        np.array_equal(files.read(head, part), files.read(embedding, part)) for part in rows
    ):
        raise ValueError(
            f'config.json has "tie_word_embeddings": true, but the file\'s {head} differs from {embedding}. Set it to '
            f"false to use both, or remove {head} from the file."
        )


def _check_tensors(files: CheckpointFiles, shapes: Mapping[str, Shape], weight_map: WeightMap) -> None:
    """Refuse files whose tensors are not those of a model with arrays of these shapes."""
    expected = weight_map.tensor_shapes(shapes)
    head = weight_map.rule(HEAD).tensor if HEAD in weight_map else None
    present = {name for name in files.tensor_names if not weight_map.is_other(name)}
    # Old exports hold the rotary table, and tied models a copy of the embedding as head: both follow from the rest.
    implied = {name for name in present if name.endswith("rotary_emb.inv_freq")}
    if head is not None and head not in expected:
        implied.add(head)
    untied = ': config.json ties no embeddings; set "tie_word_embeddings" to true if the embedding is the head'
    problems = [
        f"tensor {name} is missing{untied if name == head else ''}" for name in sorted(expected.keys() - present)
    ]
    problems += [
        f"tensor {plain(name)} is not part of this model" for name in sorted(present - expected.keys() - implied)
    ]
    problems += [
        f"tensor {name} has shape {files.shape(name)}, expected {shape} from config.json"
        for name, shape in expected.items()
        if name in present and files.shape(name) != shape
    ]
    if problems:
        raise ValueError(
            f"the weights do not fit config.json (model_type {json.dumps(files.config.get('model_type'))}):\n  "
            f"{listed(problems, most=5)}"
        )
    if head is not None and head in present - expected.keys():
        _check_tied_head(files, head, weight_map.rule(EMBEDDING).tensor)


def tensors_to_save(model: PyTree, weight_map: WeightMap, dtype: np.dtype | None) -> dict[str, SavedTensor]:
    """The tensors to save of a model's parameters, by name.

    Args:
      model: pytree of parameters, without adapters or quantised weights.
      weight_map: which arrays make which tensors.
      dtype: of the tensors; None keeps the parameters' own.
    """
    leaves = jax.tree_util.tree_flatten_with_path(model)[0]
    return weight_map.tensors({parameter_path(path): _as_stored(leaf) for path, leaf in leaves}, dtype)


def _as_stored(array: jax.Array) -> jax.Array | np.ndarray:
    """The array itself or, on CPU, a NumPy view of its memory, whose slices cost nothing."""
    devices = array.devices()
    return np.asarray(array) if len(devices) == 1 and next(iter(devices)).platform == "cpu" else array


def tensors_to_keep(source: str, weight_map: WeightMap) -> dict[str, SavedTensor]:
    """The tensors of a model's folder that belong to other parts than the language model, by name, unchanged.

    Raises:
      FileNotFoundError: the folder is not there any more.
    """
    try:
        files = open_checkpoint(source)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"the model was loaded from {source}, which is gone, and with it the other parts of the model (a vision "
            "tower) that are saved beside it. Put the folder back, or load the model from where it is now."
        ) from error
    return {
        name: SavedTensor(files.shape(name), files.dtype(name), functools.partial(files.read, name))
        for name in files.tensor_names
        if weight_map.is_other(name)
    }

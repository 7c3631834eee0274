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

from easydel.errors import listed, plain, shown
from easydel.infra.mesh import PartitionRules, parameter_path, parameter_sharding
from easydel.paths import HUB_ID
from easydel.weights.adapter_files import ADAPTER_CONFIG, is_adapter_folder
from easydel.weights.folder import KEPT_FILES, CheckpointFiles, SafetensorsFolder
from easydel.weights.gguf.checkpoint import GGUFCheckpoint

Tree = TypeVar("Tree", bound=PyTree)
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", *KEPT_FILES]
# Other copies of the same weights: the original authors' format, and subfolders of any kind.
HUB_FILES_NOT_READ = ["consolidated*", "*/*"]
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
ROWS_AT_ONCE = 8192


def local_path(name_or_path: str | Path) -> Path:
    """A local model folder or ``.gguf`` file: the path itself, or the snapshot of a hub id.

    Raises:
      FileNotFoundError: no such path, and no such hub id can be reached.
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
      ValueError: lists every missing, surplus and mis-shaped tensor; or a tensor holds NaN or infinity, or a tied
        model a head of its own.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(skeleton)
    shapes = {parameter_path(path): leaf.shape for path, leaf in leaves}
    _check_tensors(files, shapes, tensor_names)
    if HEAD in files.tensor_names and HEAD not in {tensor_names[path] for path in shapes}:
        _check_tied_head(files)

    def load(path: str, shape: tuple[int, ...]) -> jax.Array:
        name = tensor_names[path]

        def read(index: tuple[slice, ...] | None) -> np.ndarray:
            index = index or (slice(None),) * len(shape)
            if "{layer}" not in name:
                return _finite(name, files.read(name, index).astype(param_dtype))
            layers = range(*index[0].indices(shape[0]))
            names = [name.format(layer=layer) for layer in layers]
            # Stacking copies, so that each may be the file's own array.
            return np.stack([_finite(n, files.read(n, index[1:]).astype(param_dtype, copy=False)) for n in names])

        return jax.make_array_from_callback(shape, parameter_sharding(path, shape, rules, mesh), read)

    return jax.tree_util.tree_unflatten(treedef, [load(parameter_path(path), leaf.shape) for path, leaf in leaves])


def check_layer_count(files: CheckpointFiles, tensor_names: Mapping[str, str]) -> None:
    """Compare the number of layers in ``config.json`` with the files' names, before anything of that length is made.

    Raises:
      ValueError: they differ; names both.
    """
    prefixes = {name.partition("{layer}")[0] for name in tensor_names.values() if "{layer}" in name}
    layer = re.compile(f"(?:{'|'.join(map(re.escape, sorted(prefixes)))})([0-9]+)[.]")
    held = {match[1] for match in map(layer.match, files.tensor_names) if match}
    said = files.config.get("num_hidden_layers")
    if isinstance(said, int) and not isinstance(said, bool) and said != len(held):
        raise ValueError(
            f'config.json has "num_hidden_layers": {shown(said)}, but the weights hold {len(held)} layers (named '
            f"{' or '.join(f'{prefix}N' for prefix in sorted(prefixes))}, N from 0)."
        )


def _finite(name: str, array: np.ndarray) -> np.ndarray:
    """The array itself, every entry a finite number."""
    # A sum is finite where all entries are, and takes a third of the time of looking at each; one that overflows
    # is looked into.
    with np.errstate(over="ignore", invalid="ignore"):
        is_finite = np.isfinite(array.sum(dtype=np.float32))
    if not is_finite and (count := int((~np.isfinite(array)).sum())):
        raise ValueError(
            f"tensor {name} holds NaN or infinity as {array.dtype} ({count} of {array.size} entries): they are damaged"
            f"{', or too large for float16' if array.dtype == np.float16 else ''}."
        )
    return array


def _check_tied_head(files: CheckpointFiles) -> None:
    """A tied model's file may repeat the embedding as its head, no more: transformers 4 ignores a head of its own,
    transformers 5 uses it.
    """
    shape = files.shape(EMBEDDING)
    rows = [
        (slice(start, min(start + ROWS_AT_ONCE, shape[0])), slice(None)) for start in range(0, shape[0], ROWS_AT_ONCE)
    ]
    if files.shape(HEAD) != shape or not all(
        np.array_equal(files.read(HEAD, part), files.read(EMBEDDING, part)) for part in rows
    ):
        raise ValueError(
            f'config.json has "tie_word_embeddings": true, but the file\'s {HEAD} differs from {EMBEDDING}. Set it to '
            f"false to use both, or remove {HEAD} from the file."
        )


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
    if HEAD not in expected:
        implied.add(HEAD)
    untied = ': config.json ties no embeddings; set "tie_word_embeddings" to true if the embedding is the head'
    problems = [
        f"tensor {name} is missing{untied if name == HEAD else ''}" for name in sorted(expected.keys() - present)
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

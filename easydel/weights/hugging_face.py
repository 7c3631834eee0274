"""Read slices of tensors from a Hugging Face model folder, and write such a folder."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from easydel.errors import listed, plain, shown
from easydel.paths import user_path
from easydel.weights.files import is_inside, read_json, replacing_files
from easydel.weights.weight_map import SavedTensor

logger = logging.getLogger("easydel")
CONFIG, WEIGHTS, WEIGHTS_INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
OWN_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
SHARD_SUFFIX = re.compile(r".*(-of-\d+\.safetensors)")
# Files that are kept beside the weights: settings for sampling, and the terms of use. A model card describes the
# original, code is not run here, and the tokenizer is saved by the caller.
KEPT_FILES = (
    "generation_config.json",
    *(f"{name}{suffix}" for name in ("LICENSE", "NOTICE", "USE_POLICY") for suffix in ("", ".txt", ".md")),
)
LARGEST_KEPT = 2**20
FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
# Ends of the names of tensors that quantised checkpoints hold beside or in place of a weight -> the method.
QUANTISED_NAMES = {
    ".qweight": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".weight_scale_inv": "fp8",
    ".weight_scale": "fp8 or compressed-tensors",
    ".weight.absmax": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".scales": "GPTQ, AWQ or MLX",
}
UNQUANTISE = (
    "Load the model it was made from; to train adapters beside 8-bit weights, set quantize_base (--quantize-base) and "
    "the weights are quantised while loading."
)


class CheckpointFiles(Protocol):
    """Tensors of a model on disk under their Hugging Face names, read one slice at a time.

    Attributes:
      path: folder or file.
      config: the contents of ``config.json``.
    """

    path: Path
    config: dict[str, Any]

    @property
    def kept_files(self) -> tuple[tuple[str, str], ...]:
        """Names and texts of the files that `save_pretrained` writes beside the weights."""
        ...

    @property
    def tensor_names(self) -> list[str]:
        """The names of all tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        ...

    def dtype(self, name: str) -> np.dtype:
        """Dtype of the values that `read` returns."""
        ...

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """Values of a tensor or of a slice of it, one slice per axis; None reads all of it."""
        ...


class SafetensorsFolder:
    """A folder with ``config.json`` and safetensors weights, in one file or in shards with an index.

    Where a folder has both, the one file is read, as in transformers.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is damaged, the index and the shards disagree, or the weights are quantised.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = read_json(self.path / CONFIG)
        _refuse_quantised_config(self.path / CONFIG, self.config)
        self._stack = ExitStack()
        if (self.path / WEIGHTS).exists():
            self._readers = self._open(WEIGHTS)
            self._report_unused_index()
        elif (self.path / WEIGHTS_INDEX).exists():
            self._readers = self._open_shards(read_weight_map(self.path))
        else:
            raise FileNotFoundError(
                f"{self.path} has a {CONFIG} but neither {WEIGHTS} nor {WEIGHTS_INDEX}. Weights in other formats "
                f"(.bin, .pt) are not read: convert them to safetensors first."
            )
        self._refuse_unread_types()

    @property
    def kept_files(self) -> tuple[tuple[str, str], ...]:
        """Names and texts of the files that go with the weights; see `KEPT_FILES`."""
        return read_kept_files(self.path)

    @property
    def tensor_names(self) -> list[str]:
        """The names of all tensors, in the order of the files."""
        return list(self._readers)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the file's header."""
        return tuple(self._readers[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> np.dtype:
        """Dtype of a tensor, from the file's header."""
        return np.dtype(FLOATS[self._readers[name].get_slice(name).get_dtype()])

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """Values of a tensor or of a slice of it, in its own dtype; only those bytes are read."""
        tensor = self._readers[name].get_slice(name)
        return tensor[index if index is not None else ...]

    def _open(self, file: str) -> dict[str, Any]:
        """The tensors of one file: name -> reader."""
        path = self.path / file
        if not path.is_file():
            raise FileNotFoundError(f"{path} is no plain file; expected safetensors weights.")
        try:
            reader = self._stack.enter_context(safe_open(str(path), framework="numpy"))
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} is not a readable safetensors file ({plain(str(error))}); is the download complete?"
            ) from error
        return dict.fromkeys(reader.keys(), reader)

    def _open_shards(self, weight_map: Mapping[str, str]) -> dict[str, Any]:
        index = self.path / WEIGHTS_INDEX
        files = sorted(set(weight_map.values()))
        missing = [file for file in files if not (self.path / file).exists()]
        if missing:
            raise FileNotFoundError(
                f"{index} names {', '.join(map(plain, missing[:3]))}{', …' if len(missing) > 3 else ''}, not in "
                f"{self.path}; is the download complete?"
            )
        files_of: dict[str, list[str]] = {}
        readers: dict[str, Any] = {}
        for file in files:
            tensors = self._open(file)
            readers |= tensors
            for name in tensors:
                files_of.setdefault(name, []).append(file)
        problems = [
            f"tensor {plain(name)} is in {' and in '.join(found)}" for name, found in files_of.items() if len(found) > 1
        ]
        problems += [
            f"tensor {plain(name)} is in {files_of[name][0]}, which the index does not say"
            for name in files_of
            if name not in weight_map
        ]
        problems += [
            f"tensor {plain(name)} is not in {file}, which the index names"
            for name, file in weight_map.items()
            if file not in files_of.get(name, [])
        ]
        sets = {match[1] for match in map(SHARD_SUFFIX.fullmatch, files) if match}
        problems += [
            f"{plain(path.name)} is a shard of the same set, and the index does not name it"
            for path in sorted(self.path.glob("*.safetensors"))
            if path.name not in files and path.name.startswith("model") and path.name.endswith(tuple(sets))
        ]
        if problems:
            raise ValueError(f"{index} does not fit the shards; save or download the model again:\n  {_few(problems)}")
        return readers

    def _report_unused_index(self) -> None:
        """Warn that an index beside the one file is ignored, where it names other files."""
        if not (self.path / WEIGHTS_INDEX).exists():
            return
        try:
            others = set(read_weight_map(self.path).values()) - {WEIGHTS}
        except ValueError:
            others = {"files that cannot be used"}
        if others:
            logger.warning(
                "%s holds both %s and %s, which names %s: %s is read, as by transformers. Remove the one that is old.",
                self.path,
                WEIGHTS,
                WEIGHTS_INDEX,
                ", ".join(map(plain, sorted(others)[:3])),
                WEIGHTS,
            )

    def _refuse_unread_types(self) -> None:
        types = {name: self._readers[name].get_slice(name).get_dtype() for name in self._readers}
        wrong = [f"tensor {plain(name)} is {kind}" for name, kind in types.items() if kind not in FLOATS]
        methods = {method for name in types for suffix, method in QUANTISED_NAMES.items() if name.endswith(suffix)} or (
            {"fp8"} if any(kind.startswith("F8") for kind in types.values()) else set()
        )
        if methods:
            found = wrong or [f"tensor {plain(name)}" for name in types if name.endswith(tuple(QUANTISED_NAMES))]
            raise ValueError(
                f"{self.path} holds quantised weights ({', '.join(sorted(methods))}), which are not read: "
                f"{found[0]}. {UNQUANTISE}"
            )
        if wrong:
            raise ValueError(
                f"{self.path} holds weights that are no floating-point numbers of 16, 32 or 64 bits:\n  {_few(wrong)}"
                f"\n{UNQUANTISE}"
            )


def _few(problems: Sequence[str]) -> str:
    return listed(problems, most=4)


def _refuse_quantised_config(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse weights that are quantised according to ``config.json``, before any file is opened."""
    for key in ("quantization_config", "compression_config", "quantization"):
        settings = config.get(key)
        if settings:
            method = settings.get("quant_method") if isinstance(settings, dict) else None
            raise ValueError(
                f'{path} says that the weights are quantised ("{key}": {shown(method or settings)}); not read. '
                f'{UNQUANTISE} If the weights are plain numbers after all, remove "{key}" from {CONFIG}.'
            )


def read_weight_map(folder: Path) -> dict[str, str]:
    """Read the index of a folder: tensor -> file, where every file is a safetensors file inside the folder.

    Raises:
      FileNotFoundError: there is no index.
      ValueError: the index is no such mapping; names the wrong entries.
    """
    path = folder / WEIGHTS_INDEX
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(
            f'{path} has "weight_map": {shown(weight_map)}, expected an object that names the file of every tensor.'
        )
    plain_name = re.compile(r"[^/\\\0]+\.safetensors")
    problems = [
        f"tensor {plain(name)}: {shown(file)}"
        for name, file in weight_map.items()
        if not (isinstance(file, str) and plain_name.fullmatch(file) and is_inside(folder, folder / file))
    ]
    if problems:
        raise ValueError(
            f"{path} names what is no plain name of a .safetensors file inside the folder; links out of it are not "
            f"followed:\n  {_few(problems)}"
        )
    return weight_map


def read_kept_files(folder: Path) -> tuple[tuple[str, str], ...]:
    """Read the names and texts of a folder's `KEPT_FILES`; a warning is logged for those that cannot be read."""
    kept = []
    for name in KEPT_FILES:
        path = folder / name
        if not path.is_file():
            continue
        try:
            if not is_inside(folder, path):
                raise ValueError(f"{path} is a link out of the folder")
            if path.stat().st_size > LARGEST_KEPT:
                raise ValueError(f"{path} has more than {LARGEST_KEPT} bytes")
            if path.suffix == ".json":
                read_json(path)
            kept.append((name, path.read_bytes().decode("utf-8")))
        except (OSError, ValueError) as error:
            logger.warning("%s is not kept beside the weights: %s", name, error)
    return tuple(kept)


def write_folder(
    folder: str | Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, SavedTensor],
    max_shard_size: str = "5GB",
    kept_files: Sequence[tuple[str, str]] = (),
) -> None:
    """Write a model folder: ``config.json``, safetensors (in shards with an index where they are large), other texts.

    Values are fetched one shard at a time. Weights of another model in the folder are removed at the end.

    Args:
      folder: the folder to write to, made if absent.
      config: the contents of ``config.json``.
      tensors: name -> tensor.
      max_shard_size: largest weights file, e.g. "5GB".
      kept_files: names and texts of other files.

    Raises:
      OSError: the folder cannot be written; files that were there stay.
    """
    folder = user_path(folder)
    split = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    texts = {CONFIG: json.dumps(dict(config), indent=2), **dict(kept_files)}
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        texts[WEIGHTS_INDEX] = json.dumps(index, indent=2, sort_keys=True)
    with replacing_files(folder) as new:
        for file, text in texts.items():
            (new / file).write_bytes(text.encode("utf-8"))
        for file, names in split.filename_to_tensors.items():
            save_file({name: tensors[name].read() for name in names}, new / file, metadata={"format": "pt"})
            shutil.copymode(new / CONFIG, new / file)  # safetensors makes its files private
        for old in folder.iterdir():
            if OWN_FILE.fullmatch(old.name) and not (new / old.name).exists():
                old.unlink()

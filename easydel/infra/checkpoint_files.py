"""Hugging Face model folders: reading slices of tensors, writing shards."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy, which safetensors needs
import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

CONFIG, WEIGHTS, WEIGHTS_INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
OWN_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")


class CheckpointFiles(Protocol):
    """Tensors of a model on disk under their Hugging Face names, read one slice at a time."""

    config: dict[str, Any]

    @property
    def tensor_names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray: ...


class SafetensorsFolder:
    """A folder with ``config.json`` and safetensors weights, in one file or in shards with an index."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.config = read_json(self.folder / CONFIG)
        index = self.folder / WEIGHTS_INDEX
        if index.exists():
            files = sorted(set(read_json(index)["weight_map"].values()))
        elif (self.folder / WEIGHTS).exists():
            files = [WEIGHTS]
        else:
            raise FileNotFoundError(
                f"{self.folder} has a {CONFIG} but neither {WEIGHTS} nor {WEIGHTS_INDEX}. Weights in other formats "
                f"(.bin, .pt) are not read: convert them to safetensors first."
            )
        self._stack = ExitStack()
        self._readers = {}
        for file in files:
            path = self.folder / file
            if not path.exists():
                raise FileNotFoundError(
                    f"{index} names {file}, which is not in {self.folder}; is the download complete?"
                )
            try:
                reader = self._stack.enter_context(safe_open(str(path), framework="numpy"))
            except SafetensorError as error:
                raise ValueError(
                    f"{path} is not a readable safetensors file ({error}); is the download complete?"
                ) from error
            self._readers.update(dict.fromkeys(reader.keys(), reader))

    @property
    def tensor_names(self) -> list[str]:
        return list(self._readers)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._readers[name].get_slice(name).get_shape())

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        tensor = self._readers[name].get_slice(name)
        return tensor[index if index is not None else ...]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or an error that names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path.parent} has no {path.name}; expected a Hugging Face model folder.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, expected a JSON object.")
    return value


def write_folder(
    folder: str | Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], max_shard_size: str = "5GB"
) -> None:
    """Write ``config.json`` and the tensors as safetensors, in shards with an index when they are large."""
    folder = Path(folder)
    split = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    texts = {CONFIG: json.dumps(dict(config), indent=2)}
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        texts[WEIGHTS_INDEX] = json.dumps(index, indent=2, sort_keys=True)
    with replacing_files(folder) as new:
        for file, text in texts.items():
            (new / file).write_text(text, encoding="utf-8")
        for file, names in split.filename_to_tensors.items():
            save_file({name: tensors[name] for name in names}, new / file, metadata={"format": "pt"})
            shutil.copymode(new / CONFIG, new / file)  # safetensors makes its files private
        for old in folder.iterdir():
            if OWN_FILE.fullmatch(old.name) and not (new / old.name).exists():
                old.unlink()


@contextmanager
def replacing_files(folder: Path) -> Iterator[Path]:
    """A folder whose files take their places in `folder` at the end; a write that fails leaves what was there."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="saving-") as name:
        new = Path(name)
        try:
            yield new
        except SafetensorError as error:  # what its writer makes of a full disk
            raise OSError(f"{folder} could not be written: {error}") from error
        for path in new.iterdir():
            path.replace(folder / path.name)

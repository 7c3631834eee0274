"""Read a ``.gguf`` model file as if it were a Hugging Face folder."""

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from easydel.errors import plain
from easydel.weights.gguf.config import ROPE_FACTORS, hugging_face_config
from easydel.weights.gguf.header import GGUFTensor, read_header

MODEL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

# llama.cpp rotates neighbouring rows by one angle, Hugging Face rows that are half a head apart, so the llama converter
# reorders the rows of q and k; llama.cpp runs the other architectures in Hugging Face order.
PERMUTED_ARCHITECTURES = frozenset({"llama"})


def hugging_face_name(name: str) -> str | None:
    """The Hugging Face name of a ggml tensor; None where it has none.

    Example:
      >>> hugging_face_name("blk.3.attn_q.weight")
      'model.layers.3.self_attn.q_proj.weight'
    """
    if name in MODEL_NAMES:
        return MODEL_NAMES[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in LAYER_NAMES:
        return None
    return f"model.layers.{match[1]}.{LAYER_NAMES[match[2]]}.{match[3]}"


class GGUFCheckpoint:
    """A GGUF model file with the interface of `CheckpointFiles`: Hugging Face config, names and shapes, float32 values.

    Tensors are dequantised when read, one at a time; the last one stays in memory, because a loader asks for the
    slices of one tensor in a row. Needs the ``gguf`` extra.

    Raises:
      ImportError: the gguf package is missing.
      FileNotFoundError: there is no such file.
      ValueError: the file is no GGUF model, is truncated, or holds a model that cannot be represented.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        _require_gguf()
        self.path = Path(path)
        header = read_header(self.path)
        self.metadata = header.metadata
        self._data = np.memmap(self.path, mode="r")
        self._check_extents(header.tensors)
        self.config = hugging_face_config(self.path, header, self._rope_factors(header.tensors))
        self._tensors: dict[str, GGUFTensor] = {}
        surplus: list[str] = []
        for name, tensor in header.tensors.items():
            hf_name = hugging_face_name(name)
            if hf_name is not None:
                self._tensors[hf_name] = tensor
            elif name != ROPE_FACTORS:
                surplus.append(name)
        if surplus:
            raise ValueError(
                f"{self.path}: {len(surplus)} tensors have no place in a {self.config['model_type']} model: "
                f"{', '.join(map(plain, surplus[:5]))}{', …' if len(surplus) > 5 else ''}. "
                "Load the model's Hugging Face folder."
            )
        self._last: tuple[str, np.ndarray] | None = None

    @property
    def kept_files(self) -> tuple[tuple[str, str], ...]:
        """Always empty: no files belong to a GGUF file."""
        return ()

    @property
    def tensor_names(self) -> list[str]:
        """Hugging Face names, in the order of the file."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, as Hugging Face stores it: ``[out, in]`` for a weight."""
        return self._find(name).shape

    def dtype(self, name: str) -> np.dtype:
        """Dtype of the values that `read` returns."""
        return np.dtype(np.float32)

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """Values of a tensor or of a slice of it, float32, read-only.

        Raises:
          KeyError: the file has no such tensor.
          ValueError: the gguf package cannot dequantise the tensor's type.
        """
        tensor = self._find(name)
        last = self._last
        if last is None or last[0] != name:
            # Free the old tensor first, so that there are never two in memory.
            self._last = last = None
            values = self._dequantize(name, tensor)
            heads = _heads_in_rows(name, self.config)
            if heads is not None and self.config["model_type"] in PERMUTED_ARCHITECTURES:
                values = unpermute_rotary(values, heads)
            values.flags.writeable = False
            self._last = last = (name, values)
        return last[1] if index is None else last[1][index]

    def _find(self, name: str) -> GGUFTensor:
        if name not in self._tensors:
            raise KeyError(f"{self.path} has no tensor {name}; it has {len(self._tensors)}, see tensor_names.")
        return self._tensors[name]

    def _check_extents(self, tensors: Mapping[str, GGUFTensor]) -> None:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        for name, tensor in tensors.items():
            if tensor.ggml_type not in GGML_QUANT_SIZES:
                raise ValueError(
                    f"{self.path}: tensor {plain(name)} has ggml type {tensor.ggml_type}, which the installed gguf "
                    "package does not know. Upgrade it: pip install --upgrade gguf"
                )
            kind = GGMLQuantizationType(tensor.ggml_type)
            block = GGML_QUANT_SIZES[kind][0]
            if tensor.shape[-1] % block:
                raise ValueError(
                    f"{self.path}: tensor {plain(name)} has rows of {tensor.shape[-1]} values, expected a multiple of "
                    f"{block} for {kind.name}; the file is damaged."
                )
            end = tensor.offset + _byte_size(tensor)
            if end > len(self._data):
                raise ValueError(
                    f"{self.path} is truncated: tensor {plain(name)} ends at byte {end}, the file has "
                    f"{len(self._data)}. Fetch it again."
                )

        last_name, last_end = "", 0
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
            if tensor.offset < last_end:
                raise ValueError(
                    f"{self.path}: tensors {plain(last_name)} and {plain(name)} overlap; the file is damaged."
                )
            last_name, last_end = name, tensor.offset + _byte_size(tensor)

    def _rope_factors(self, tensors: Mapping[str, GGUFTensor]) -> np.ndarray | None:
        return self._dequantize(ROPE_FACTORS, tensors[ROPE_FACTORS]) if ROPE_FACTORS in tensors else None

    def _dequantize(self, name: str, tensor: GGUFTensor) -> np.ndarray:
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        kind = GGMLQuantizationType(tensor.ggml_type)
        stored = np.asarray(self._data[tensor.offset : tensor.offset + _byte_size(tensor)])
        try:
            values = dequantize(stored.reshape(*tensor.shape[:-1], -1), kind)
        except NotImplementedError as error:
            raise ValueError(
                f"{self.path}: tensor {name} is stored as {kind.name}, which the installed gguf package cannot turn "
                "into float32. Upgrade it (pip install --upgrade gguf) or take another quantisation of the model."
            ) from error
        return values.reshape(tensor.shape)


def unpermute_rotary(values: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of a q or k projection from llama.cpp's order to Hugging Face's.

    Args:
      values: weight ``[heads * head_dim, in]`` or bias ``[heads * head_dim]``; in each head, rows 2i and 2i + 1
        are rotated by one angle.
      heads: number of heads in the rows.

    Returns:
      The same shape; in each head, rows i and i + head_dim / 2 are rotated by one angle.
    """
    pairs = values.reshape(heads, -1, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _require_gguf() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ImportError('Reading .gguf files needs the gguf package: pip install "easydel-dpo[gguf]"') from error


def _byte_size(tensor: GGUFTensor) -> int:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.ggml_type)]
    return math.prod(tensor.shape) // block * block_bytes


def _heads_in_rows(name: str, config: Mapping[str, Any]) -> int | None:
    if ".self_attn.q_proj." in name:
        return config["num_attention_heads"]
    if ".self_attn.k_proj." in name:
        return config["num_key_value_heads"]
    return None

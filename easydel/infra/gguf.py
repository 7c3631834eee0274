"""Read a ``.gguf`` model file as if it were a Hugging Face folder."""

import math
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

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
ROPE_FACTORS = "rope_freqs.weight"

# llama.cpp turns neighbouring rows by one angle, Hugging Face rows half a head apart, so the llama converter
# reorders the rows of q and k; llama.cpp runs the other architectures in Hugging Face order.
PERMUTED_ARCHITECTURES = frozenset({"llama"})

_MAX_DIMENSIONS = 4
_SCALAR_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_FLOAT32, _STRING, _ARRAY = 6, 8, 9


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """Where one tensor lies: shape in numpy order, ggml type number, first byte in the file."""

    shape: tuple[int, ...]
    ggml_type: int
    offset: int


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """Everything in a GGUF file that comes before the weights."""

    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]


class _HeaderReader:
    """A position in the header; every read checks that the file goes on that far."""

    # The gguf package's own reader makes one numpy array a token and merge: seconds, where this takes a fraction.
    def __init__(self, path: Path, data: memoryview) -> None:
        self.path, self.data, self.position = path, data, 0

    def take(self, size: int) -> memoryview:
        start, end = self.position, self.position + size
        if end > len(self.data):
            raise ValueError(
                f"{self.path} is truncated: its header needs byte {end}, the file has {len(self.data)}. Fetch it again."
            )
        self.position = end
        return self.data[start:end]

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
        if kind not in _SCALAR_FORMATS:
            return [self.value(kind) for _ in range(count)]
        item = np.dtype(_SCALAR_FORMATS[kind]).newbyteorder("<")
        return np.frombuffer(self.take(count * item.itemsize), item).tolist()


def read_header(path: str | os.PathLike[str]) -> GGUFHeader:
    """Metadata and tensor places of a GGUF file, version 2 or 3, little-endian.

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
        metadata[key] = reader.value(reader.scalar("I"))
    if metadata.get("split.count", 0) > 1:
        raise ValueError(
            f"{path} is part {metadata.get('split.no', 0) + 1} of {metadata['split.count']} of a split model. "
            "Join the parts first: llama-gguf-split --merge FIRST_PART OUTPUT."
        )

    places: list[tuple[str, tuple[int, ...], int, int]] = []
    for _ in range(tensor_count):
        name, rank = reader.string(), reader.scalar("I")
        if not 1 <= rank <= _MAX_DIMENSIONS:
            raise ValueError(
                f"{path}: tensor {name} has {rank} dimensions, expected 1 to {_MAX_DIMENSIONS}; the file is damaged."
            )
        shape = tuple(reversed([reader.scalar("Q") for _ in range(rank)]))
        places.append((name, shape, reader.scalar("I"), reader.scalar("Q")))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"{path}: general.alignment={alignment!r}, expected a positive integer; the file is damaged.")
    start = math.ceil(reader.position / alignment) * alignment
    tensors = {name: GGUFTensor(shape, kind, start + offset) for name, shape, kind, offset in places}
    if len(tensors) != len(places):
        raise ValueError(f"{path} names a tensor twice; the file is damaged.")
    return GGUFHeader(metadata, tensors)


def hugging_face_name(name: str) -> str | None:
    """The Hugging Face name of a ggml tensor, or None for one that has none."""
    if name in MODEL_NAMES:
        return MODEL_NAMES[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in LAYER_NAMES:
        return None
    return f"model.layers.{match[1]}.{LAYER_NAMES[match[2]]}.{match[3]}"


class GGUFCheckpoint:
    """A GGUF model file with the face of a Hugging Face folder: config, tensor names, shapes, float32 values.

    Tensors are dequantised when read, one at a time; the last one stays in memory, because a loader asks for the
    slices of one tensor in a row. Needs the ``gguf`` extra.

    Example:
      >>> checkpoint = GGUFCheckpoint("SmolLM2-135M-Instruct.Q4_1.gguf")  # doctest: +SKIP
      >>> checkpoint.read("model.layers.3.self_attn.q_proj.weight").shape  # doctest: +SKIP
      (576, 576)

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
        self.config = _config(self.path, header, self._rope_factors(header.tensors))
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
                f"{', '.join(surplus[:5])}{', …' if len(surplus) > 5 else ''}. Load the model's Hugging Face folder."
            )
        self._last: tuple[str, np.ndarray] | None = None

    @property
    def tensor_names(self) -> list[str]:
        """Hugging Face names, in the order of the file."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, as Hugging Face stores it: ``[out, in]`` for a weight."""
        return self._find(name).shape

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """Values of a tensor or of one part of it, float32, read-only.

        Raises:
          KeyError: the file has no such tensor.
          ValueError: the gguf package cannot dequantise the tensor's type.
        """
        tensor = self._find(name)
        last = self._last
        if last is None or last[0] != name:
            # The old tensor goes before the new one comes, so that there are never two.
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
                    f"{self.path}: tensor {name} has ggml type {tensor.ggml_type}, which the installed gguf package "
                    "does not know. Upgrade it: pip install --upgrade gguf"
                )
            kind = GGMLQuantizationType(tensor.ggml_type)
            block = GGML_QUANT_SIZES[kind][0]
            if tensor.shape[-1] % block:
                raise ValueError(
                    f"{self.path}: tensor {name} has rows of {tensor.shape[-1]} values, expected a multiple of {block} "
                    f"for {kind.name}; the file is damaged."
                )
            end = tensor.offset + _byte_size(tensor)
            if end > len(self._data):
                raise ValueError(
                    f"{self.path} is truncated: tensor {name} ends at byte {end}, the file has {len(self._data)}. "
                    "Fetch it again."
                )

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
    """Rows of a q or k projection from llama.cpp's order to Hugging Face's.

    Args:
      values: weight ``[heads * head_dim, in]`` or bias ``[heads * head_dim]``; in each head, rows 2i and 2i + 1 turn
        by one angle.
      heads: number of heads in the rows.

    Returns:
      The same shape; in each head, rows i and i + head_dim / 2 turn by one angle.
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


def _config(path: Path, header: GGUFHeader, rope_factors: np.ndarray | None) -> dict[str, Any]:
    metadata, tensors = header.metadata, header.tensors
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"{path}: general.architecture is {architecture!r}, expected one of {', '.join(ARCHITECTURES)}."
        )

    def need(key: str) -> Any:
        if f"{architecture}.{key}" not in metadata:
            raise ValueError(
                f"{path} has no {architecture}.{key}, which a {architecture} model needs; convert it again."
            )
        return metadata[f"{architecture}.{key}"]

    def optional(key: str, default: Any) -> Any:
        return metadata.get(f"{architecture}.{key}", default)

    if optional("expert_count", 0):
        raise ValueError(f"{path} is a mixture of {optional('expert_count', 0)} experts, expected a dense model.")
    if "token_embd.weight" not in tensors:
        raise ValueError(f"{path} has no tensor token_embd.weight; expected a whole language model.")

    heads = _one_for_all_layers(path, "attention.head_count", need("attention.head_count"))
    head_dim = optional("attention.key_length", need("embedding_length") // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if optional(key, head_dim) != head_dim:
            raise ValueError(
                f"{path}: {architecture}.{key}={optional(key, head_dim)}, expected the head size {head_dim}; "
                "heads that turn in part or whose values differ in size are not supported."
            )
    rope_theta = optional("rope.freq_base", 10000.0)
    rope_scaling = _rope_scaling(path, metadata, architecture)
    if rope_factors is not None:
        if rope_scaling is not None:
            raise ValueError(
                f"{path} has both {rope_scaling['rope_type']} rope scaling and {ROPE_FACTORS}, expected one."
            )
        rope_scaling = _llama3_rope_scaling(path, rope_factors, rope_theta, head_dim)
    return {
        "architectures": [ARCHITECTURES[architecture]],
        "model_type": architecture,
        "hidden_act": "silu",
        "hidden_size": need("embedding_length"),
        "intermediate_size": _one_for_all_layers(path, "feed_forward_length", need("feed_forward_length")),
        "num_hidden_layers": need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _one_for_all_layers(
            path, "attention.head_count_kv", optional("attention.head_count_kv", heads)
        ),
        "head_dim": head_dim,
        "rms_norm_eps": need("attention.layer_norm_rms_epsilon"),
        "rope_theta": rope_theta,
        "rope_scaling": rope_scaling,
        "max_position_embeddings": need("context_length"),
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }


def _one_for_all_layers(path: Path, key: str, value: int | list[int]) -> int:
    values = value if isinstance(value, list) else [value]
    if len(set(values)) != 1:
        raise ValueError(f"{path}: {key} differs between layers ({values}); expected one value for all layers.")
    return values[0]


def _rope_scaling(path: Path, metadata: Mapping[str, Any], architecture: str) -> dict[str, Any] | None:
    prefix = f"{architecture}.rope.scaling."
    kind = metadata.get(prefix + "type", "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise ValueError(f"{path}: {prefix}type is {kind!r}, expected none, linear or yarn.")
    settings = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    if "factor" not in settings:
        raise ValueError(f"{path}: {prefix}type is {kind!r} but {prefix}factor is missing; convert the model again.")
    unknown = settings.keys() - {"type", "factor", "original_context_length", "finetuned"}
    if unknown:
        raise ValueError(
            f"{path}: {', '.join(prefix + key for key in sorted(unknown))} cannot be written as a Hugging Face config. "
            "Load the model's Hugging Face folder."
        )
    scaling = {"rope_type": kind, "factor": settings["factor"]}
    if kind == "yarn" and "original_context_length" in settings:
        scaling["original_max_position_embeddings"] = settings["original_context_length"]
    return scaling


def _llama3_rope_scaling(path: Path, factors: np.ndarray, theta: float, head_dim: int) -> dict[str, Any] | None:
    """The config of which ``factors [head_dim / 2]``, dividing the rotary frequencies, are the outcome."""
    if np.all(factors == 1):
        return None
    # The file keeps the outcome, not the settings. These are the ones of every published Llama 3 model; the longest
    # wavelength is stretched by the whole factor, which tells the last of them.
    scaling = {
        "rope_type": "llama3",
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    expected = _llama3_factors(scaling, theta, head_dim)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise ValueError(
            f"{path}: the rotary factors in {ROPE_FACTORS} are not those of a llama3 rope_scaling with "
            "low_freq_factor=1, high_freq_factor=4 and 8192 original positions, so they cannot be written as a config. "
            "Load the model's Hugging Face folder."
        )
    return scaling


def _llama3_factors(scaling: Mapping[str, Any], theta: float, head_dim: int) -> np.ndarray:
    frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / (kept + (1 - kept) / scaling["factor"])

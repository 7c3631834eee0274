"""Derive the Hugging Face config of the model in a ``.gguf`` file."""

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from easydel.errors import plain, shown
from easydel.infra.config_keys import Key
from easydel.weights.gguf.header import COUNT, NUMBER, SIZE, SIZES, TEXT, GGUFHeader, checked

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
ROPE_FACTORS = "rope_freqs.weight"


def hugging_face_config(path: Path, header: GGUFHeader, rope_factors: np.ndarray | None) -> dict[str, Any]:
    """The ``config.json`` of the model in a GGUF file.

    Args:
      path: of the file, for messages.
      header: its metadata and tensors.
      rope_factors: values of its ``rope_freqs.weight``, ``[head_dim / 2]``; None where it has none.

    Raises:
      ValueError: the metadata are damaged, or describe a model that cannot be represented.
    """
    metadata, tensors = header.metadata, header.tensors
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise ValueError(
            f"{path}: general.architecture is {reprlib.repr(architecture)}, expected one of {', '.join(ARCHITECTURES)}."
        )

    def need(key: str, kind: Key = SIZE) -> Any:
        if f"{architecture}.{key}" not in metadata:
            raise ValueError(
                f"{path} has no {architecture}.{key}, which a {architecture} model needs; convert it again."
            )
        return checked(path, f"{architecture}.{key}", metadata[f"{architecture}.{key}"], kind)

    def optional(key: str, default: Any, kind: Key = SIZE) -> Any:
        return need(key, kind) if f"{architecture}.{key}" in metadata else default

    experts = optional("expert_count", 0, COUNT)
    if experts:
        raise ValueError(f"{path} is a mixture of {experts} experts, expected a dense model.")
    if "token_embd.weight" not in tensors:
        raise ValueError(f"{path} has no tensor token_embd.weight; expected a whole language model.")

    layers, hidden_size = need("block_count"), need("embedding_length")
    # Lists of this length are made long before a missing tensor would be noticed.
    if layers > len(tensors):
        raise ValueError(f"{path}: {architecture}.block_count={layers}, but the file has {len(tensors)} tensors.")
    heads = _one_for_all_layers(path, "attention.head_count", need("attention.head_count", SIZES))
    kv_heads = _one_for_all_layers(path, "attention.head_count_kv", optional("attention.head_count_kv", heads, SIZES))
    head_dim = optional("attention.key_length", hidden_size // heads)
    if head_dim < 2 or head_dim % 2 or heads % kv_heads:
        raise ValueError(
            f"{path}: {heads} heads of {head_dim} values and {kv_heads} key heads make no attention: expected heads of "
            "an even size, and a number that the key heads divide."
        )
    for key in ("attention.value_length", "rope.dimension_count"):
        if optional(key, head_dim) != head_dim:
            raise ValueError(
                f"{path}: {architecture}.{key}={optional(key, head_dim)}, expected the head size {head_dim}; "
                "heads that are rotated in part, or whose values have another size, are not supported."
            )
    rope_theta = optional("rope.freq_base", 10000.0, NUMBER)
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
        "hidden_size": hidden_size,
        "intermediate_size": _one_for_all_layers(path, "feed_forward_length", need("feed_forward_length", SIZES)),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": need("attention.layer_norm_rms_epsilon", NUMBER),
        "rope_theta": rope_theta,
        "rope_scaling": rope_scaling,
        "max_position_embeddings": need("context_length"),
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
    } | {
        name: None if metadata.get(key) is None else checked(path, key, metadata[key], COUNT)
        for name, key in (
            ("bos_token_id", "tokenizer.ggml.bos_token_id"),
            ("eos_token_id", "tokenizer.ggml.eos_token_id"),
            ("pad_token_id", "tokenizer.ggml.padding_token_id"),
        )
    }


def _one_for_all_layers(path: Path, key: str, value: int | list[int]) -> int:
    values = value if isinstance(value, list) else [value]
    if len(set(values)) != 1:
        raise ValueError(f"{path}: {key} differs between layers ({shown(values)}); expected one value for all layers.")
    if not values[0]:
        raise ValueError(f"{path}: {key}=0, expected a positive whole number; the file is damaged.")
    return values[0]


def _rope_scaling(path: Path, metadata: Mapping[str, Any], architecture: str) -> dict[str, Any] | None:
    prefix = f"{architecture}.rope.scaling."
    kind = checked(path, prefix + "type", metadata.get(prefix + "type", "none"), TEXT)
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise ValueError(f"{path}: {prefix}type is {reprlib.repr(kind)}, expected none, linear or yarn.")
    settings = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    if "factor" not in settings:
        raise ValueError(f"{path}: {prefix}type is {kind!r} but {prefix}factor is missing; convert the model again.")
    unknown = settings.keys() - {"type", "factor", "original_context_length", "finetuned"}
    if unknown:
        raise ValueError(
            f"{path}: {', '.join(plain(prefix + key) for key in sorted(unknown)[:5])} cannot be written as a Hugging "
            "Face config. Load the model's Hugging Face folder."
        )
    scaling = {"rope_type": kind, "factor": checked(path, prefix + "factor", settings["factor"], NUMBER)}
    if kind == "yarn" and "original_context_length" in settings:
        length = checked(path, prefix + "original_context_length", settings["original_context_length"], SIZE)
        scaling["original_max_position_embeddings"] = length
    return scaling


def _llama3_rope_scaling(path: Path, factors: np.ndarray, theta: float, head_dim: int) -> dict[str, Any] | None:
    """The ``rope_scaling`` that gives these divisors of the frequencies, ``[head_dim / 2]``; None if all are 1."""
    if np.all(factors == 1):
        return None
    if not np.all(np.isfinite(factors) & (factors > 0)):
        raise ValueError(f"{path}: {ROPE_FACTORS} holds numbers that are not finite and above 0; the file is damaged.")
    # The file holds the divisors, not the settings. Every published Llama 3 model has the settings below; the factor is
    # the divisor of the longest wavelength.
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

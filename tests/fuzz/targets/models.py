"""A model folder with one of its files damaged or bent: config.json, the index, the weights, an adapter."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from easydel import AutoEasyDeLModelForCausalLM
from tests.fuzz.inputs import SEEDS, bent, damaged, json_text, mutate_bytes
from tests.fuzz.made import LLAMA

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS = [
    {"rope_scaling": LLAMA3_ROPE},
    {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    {"quantization_config": {"quant_method": "fp8"}, "torch_dtype": "float16", "tie_word_embeddings": False},
    {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 16},
    {"model_type": "qwen3", "layer_types": ["full_attention", "full_attention"], "attention_bias": True},
]
SIZES = [2**20, 2**31, 2**40, 2**64, 3, 7, 1e-5, "silu", "llama", [64], {"factor": 2}]


def _folder(work: Path) -> Path:
    folder = work / "model"
    shutil.copytree(LLAMA, folder, ignore=shutil.ignore_patterns("*.npz"))
    return folder


def _load(folder: Path) -> None:
    AutoEasyDeLModelForCausalLM.from_pretrained(str(folder))


def _bytes_of(content: Any) -> bytes:
    """What a JSON file holds: the content, or damaged bytes in hexadecimal."""
    is_raw = isinstance(content, dict) and "raw" in content
    return bytes.fromhex(content["raw"]) if is_raw else json_text(content).encode()


def configs(work: Path) -> Any:
    """config.json, of every family and kind of rotary embedding."""
    folder = _folder(work)
    plain = json.loads((folder / CONFIG).read_text())

    def run(content: Any) -> Any:
        given = _bytes_of(content)
        (folder / CONFIG).write_bytes(given)
        _load(folder)

    raw = st.builds(lambda seed: {"raw": mutate_bytes(json.dumps(plain).encode(), seed).hex()}, SEEDS)
    kinds = [plain, *(plain | changes for changes in VARIANTS)]
    return bent(*kinds, extra=SIZES) | bent(*kinds, extra=SIZES) | raw | st.sampled_from(kinds), run


def indices(work: Path) -> Any:
    """model.safetensors.index.json of a model in three shards."""
    folder = _folder(work)
    index = json.loads((folder / INDEX).read_text())
    shards = sorted(set(index["weight_map"].values()))
    (work / "outside.safetensors").write_bytes((folder / shards[0]).read_bytes())
    names = [
        *shards,
        "../outside.safetensors",
        str(work / "outside.safetensors"),
        "nothing.safetensors",
        CONFIG,
        ".",
        INDEX,
    ]

    def run(content: Any) -> Any:
        given = _bytes_of(content)
        (folder / INDEX).write_bytes(given)
        _load(folder)
        used = set(json.loads(given)["weight_map"].values())
        assert all(Path(name).name == name for name in used), "a file outside of the folder was read"

    raw = st.builds(lambda seed: {"raw": mutate_bytes(json.dumps(index).encode(), seed).hex()}, SEEDS)
    return bent(index, extra=names) | raw, run


def weights(work: Path) -> Any:
    """A shard of the weights; most of the damage is in its header."""
    folder = _folder(work)
    shard = folder / "model-00001-of-00003.safetensors"
    whole = shard.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:start])

    def with_header(value: Any) -> bytes:
        text = json_text(value).encode()
        return len(text).to_bytes(8, "little") + text + whole[start:]

    def run(content: bytes) -> Any:
        shard.write_bytes(content)
        _load(folder)

    in_header = st.builds(lambda seed: mutate_bytes(whole[:start], seed) + whole[start:], SEEDS)
    kinds = ["F16", "BF16", "F8_E4M3", "I64", "BOOL", [2**40, 2**40], [0, 2**63], [-1, 4]]
    return in_header | bent(header, extra=kinds).map(with_header) | damaged(whole), run, True


def adapters(work: Path) -> Any:
    """An adapter's config and weights, on a model that is loaded once."""
    base, folder = _folder(work), work / "adapter"
    folder.mkdir()
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(base),
        "r": 2,
        "lora_alpha": 4,
        "lora_dropout": 0.0,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
        "use_rslora": False,
        "modules_to_save": None,
        "task_type": "CAUSAL_LM",
    }
    pattern = config | {"target_modules": r".*\.(q|v)_proj"}
    shapes = {name: load_file(base / file)[name].shape for file in _shards(base) for name in load_file(base / file)}
    tensors = {}
    for name, shape in shapes.items():
        if name.endswith(("q_proj.weight", "v_proj.weight")):
            module = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = np.ones((2, shape[1]), np.float32)
            tensors[f"{module}.lora_B.weight"] = np.zeros((shape[0], 2), np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    whole = (folder / "adapter_model.safetensors").read_bytes()
    hostile = [
        "(a|a)*b" * 5,
        "(.*)*" * 9 + "!",
        "(",
        "(x+x+)+y",
        "q_proj",
        ["q_proj", None],
        str(folder),
        "..",
        10**6,
        2**40,
    ]

    @functools.cache
    def model() -> Any:
        return AutoEasyDeLModelForCausalLM.from_pretrained(str(base))

    def run(given: dict[str, Any]) -> Any:
        (folder / "adapter_config.json").write_text(json_text(given["config"]))
        weights = mutate_bytes(whole, given["weights"]) if given["weights"] is not None else whole
        (folder / "adapter_model.safetensors").write_bytes(weights)
        if given["through"] == "auto":
            return AutoEasyDeLModelForCausalLM.from_pretrained(str(folder))
        return model().load_adapter(folder)

    return st.one_of(
        st.fixed_dictionaries(
            {
                "config": bent(config, pattern, extra=hostile),
                "weights": st.none(),
                "through": st.sampled_from(["auto", "model"]),
            }
        ),
        st.fixed_dictionaries({"config": st.just(config), "weights": SEEDS, "through": st.just("model")}),
    ), run


def _shards(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))

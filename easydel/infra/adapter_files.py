"""Adapters on disk in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from easydel.infra.checkpoint_files import read_json, replacing_files
from easydel.infra.layer_linears import Model, layer_linears
from easydel.infra.linear import Linear, LoraAdapter
from easydel.infra.lora import adapters, require_no_adapters, with_adapters
from easydel.infra.problems import listed

if TYPE_CHECKING:
    from easydel.infra.base_module import EasyDeLBaseModule

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# What a file may say in any way: what is read below, and what changes no number of a loaded adapter. Everything else
# must be off, so that a setting of some later PEFT is refused rather than ignored.
READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "init_lora_weights"}
WITHOUT_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
OFF: tuple[Any, ...] = (None, False, {}, [], "none")
# Starts that leave the base's weights as they are; the others (PiSSA, OLoRA, LoftQ, …) replace them.
HARMLESS_STARTS: tuple[Any, ...] = (None, True, False, "gaussian", "orthogonal", "eva")


def save_adapter(model: EasyDeLBaseModule, folder: str | Path, base_model_name_or_path: str | None = None) -> None:
    """Write a model's adapters, and nothing else of it, as a folder that `peft` opens.

    Args:
      model: a model with adapters.
      folder: where; made if absent.
      base_model_name_or_path: hub id or folder of the model without adapters, for programs that look it up.

    Raises:
      ValueError: the model has no adapters.
    """
    found = adapters(model)
    if not found:
        raise ValueError("the model has no adapters to save; save_pretrained writes the model itself.")
    first = next(iter(found.values()))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name_or_path,
        "inference_mode": True,
        "r": first.rank,
        "lora_alpha": int(first.alpha) if first.alpha.is_integer() else first.alpha,
        "lora_dropout": first.dropout,
        "use_rslora": first.use_rslora,
        "target_modules": [path.rpartition(".")[2] for path in found],
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
    }
    tensors: dict[str, np.ndarray] = {}
    for path, adapter in found.items():
        for factor, stacked in (("lora_A", np.asarray(adapter.a)), ("lora_B", np.asarray(adapter.b))):
            names = _tensor_names(model, path, factor)
            tensors |= {name: np.ascontiguousarray(one) for name, one in zip(names, stacked)}
    with replacing_files(Path(folder)) as new:
        (new / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
        save_file(tensors, new / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        shutil.copymode(new / ADAPTER_CONFIG, new / ADAPTER_WEIGHTS)  # safetensors makes its files private


def load_adapter(model: Model, folder: str | Path) -> Model:
    """The model with the adapters of a folder that `peft` or `save_adapter` wrote; its own arrays are shared.

    Raises:
      FileNotFoundError: the folder has no adapter.
      ValueError: the model has adapters already, the adapter asks for something that is not computed here, or its
        tensors do not fit; names each of them.
    """
    folder = Path(folder).expanduser()
    require_no_adapters(model)
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}; expected a folder written by peft or save_adapter.")
    config = read_json(folder / ADAPTER_CONFIG)
    _check_config(folder, config)
    try:
        tensors = load_file(folder / ADAPTER_WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{folder / ADAPTER_WEIGHTS} is not a readable safetensors file ({error}).") from error
    targets = _targets(folder, model, config["target_modules"])
    _check_tensors(folder, model, targets, config["r"], tensors)

    def stacked(path: str, factor: str) -> Array:
        return jnp.stack([tensors[name].astype(np.float32) for name in _tensor_names(model, path, factor)])

    return with_adapters(
        model,
        {
            path: LoraAdapter(
                a=stacked(path, "lora_A"),
                b=stacked(path, "lora_B"),
                alpha=float(config["lora_alpha"]),
                dropout=float(config.get("lora_dropout", 0.0)),
                use_rslora=bool(config.get("use_rslora", False)),
            )
            for path in targets
        },
    )


def is_adapter_folder(folder: Path) -> bool:
    """Whether a folder holds an adapter and no whole model."""
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").exists()


def base_of_adapter(folder: Path) -> str:
    """The model an adapter was made for, as its ``adapter_config.json`` names it.

    Raises:
      ValueError: it names none.
    """
    base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"{folder / ADAPTER_CONFIG} has no base_model_name_or_path, so the model it was made for is not known: "
            "load that model and call its load_adapter with this folder."
        )
    return base


def _module_names(model: EasyDeLBaseModule, path: str) -> list[str]:
    """A linear layer's Hugging Face names, one a decoder layer."""
    name = model.tensor_names[f"{path}.weight"].removesuffix(".weight")
    return [name.format(layer=layer) for layer in range(model.config.num_hidden_layers)]


def _tensor_names(model: EasyDeLBaseModule, path: str, factor: str) -> list[str]:
    return [f"{PREFIX}{name}.{factor}.weight" for name in _module_names(model, path)]


def _check_config(folder: Path, config: Mapping[str, Any]) -> None:
    problems = [f"{name} is missing" for name in ("r", "lora_alpha", "target_modules") if not config.get(name)]
    if config.get("peft_type") != "LORA":
        problems.append(f"peft_type is {config.get('peft_type')!r}, expected 'LORA'")
    if config.get("init_lora_weights", True) not in HARMLESS_STARTS:
        problems.append(f"init_lora_weights is {config['init_lora_weights']!r}, which changes the base's weights too")
    problems += [
        f"{name} is {value!r}, which is not computed here"
        for name, value in config.items()
        if name not in READ | WITHOUT_EFFECT and value not in OFF
    ]
    if problems:
        raise ValueError(f"{folder / ADAPTER_CONFIG} cannot be used:\n  " + "\n  ".join(problems))


def _targets(folder: Path, model: EasyDeLBaseModule, target_modules: str | Sequence[str]) -> dict[str, Linear]:
    """The linear layers that ``target_modules`` names: the ends of their names or, as text, a regular expression."""

    def is_target(name: str) -> bool:
        if isinstance(target_modules, str):
            return re.fullmatch(target_modules, name) is not None
        return any(name == target or name.endswith(f".{target}") for target in target_modules)

    targets, names, problems = {}, [], []
    for path, linear in layer_linears(model).items():
        found = [name for name in _module_names(model, path) if is_target(name)]
        if found and len(found) < model.config.num_hidden_layers:
            problems.append(f"{path} is adapted in {len(found)} of {model.config.num_hidden_layers} layers, not in all")
        if found:
            targets[path] = linear
            names += found
    if not isinstance(target_modules, str):
        problems += [
            f"target module {target} is no linear layer of the decoder layers"
            for target in target_modules
            if not any(name == target or name.endswith(f".{target}") for name in names)
        ]
    if problems or not targets:
        raise ValueError(
            f"{folder / ADAPTER_CONFIG} has target_modules {target_modules}; adapters here sit on "
            f"{', '.join(layer_linears(model))}, each in all layers:\n  " + "\n  ".join(problems or ["none matches"])
        )
    return targets


def _check_tensors(
    folder: Path, model: EasyDeLBaseModule, targets: Mapping[str, Linear], rank: int, tensors: Mapping[str, np.ndarray]
) -> None:
    expected: dict[str, tuple[int, ...]] = {}
    for path, linear in targets.items():
        _, size_out, size_in = linear.weight.shape
        for factor, shape in (("lora_A", (rank, size_in)), ("lora_B", (size_out, rank))):
            expected |= dict.fromkeys(_tensor_names(model, path, factor), shape)
    problems = [f"tensor {name} is missing" for name in sorted(expected.keys() - tensors.keys())]
    problems += [f"tensor {name} is not part of this adapter" for name in sorted(tensors.keys() - expected.keys())]
    problems += [
        f"tensor {name} has shape {tensors[name].shape}, expected {shape}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if problems:
        raise ValueError(f"{folder} does not fit the model and its own {ADAPTER_CONFIG}:\n  {listed(problems)}")

"""Save and load adapters in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from easydel.errors import listed, plain, short_repr, shown
from easydel.infra.language_model import LanguageModel
from easydel.layers.linear import Linear, LoraAdapter
from easydel.layers.lora import adapters, require_no_adapters, with_adapters
from easydel.layers.name_pattern import matching_names
from easydel.layers.surgery import Model, layer_linears
from easydel.paths import user_path
from easydel.weights.files import replacing_files
from easydel.weights.hugging_face import FLOATS
from easydel.weights.peft_config import ADAPTER_CONFIG, read_adapter_config
from easydel.weights.weight_map import Module

ADAPTER_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."


# The files' modules that hold a linear layer, by position in the leading axes of its weight.
Modules = dict[tuple[int, ...], Module]


def save_adapter(model: LanguageModel, folder: str | Path, base_model_name_or_path: str | None = None) -> None:
    """Write a model's adapters alone, as a folder that `peft` opens.

    Layers that the files hold as one module (queries, keys and values of Phi-3) get one adapter together, whose rank is
    at most the sum of theirs; the factors of other modules are padded with zeros to that rank, which changes no output.

    Args:
      model: a model with adapters.
      folder: the folder to write to, made if absent.
      base_model_name_or_path: hub id or folder of the model without adapters, for programs that load it by name.

    Raises:
      ValueError: the model has no adapters, or one on a weight that the files do not hold as a matrix.
    """
    found = adapters(model)
    if not found:
        raise ValueError("the model has no adapters to save; save_pretrained writes the model itself.")
    first, modules = next(iter(found.values())), _modules(model)
    if without := [path for path in found if not modules[path]]:
        raise ValueError(
            f"{', '.join(without)}: the model's files hold these weights as no matrices that PEFT could adapt; save "
            "the merged model (merge_lora, save_pretrained)."
        )
    factors = _factors_by_module(found, modules)
    rank = max(len(a) for a, _ in factors.values())
    # The scale stays the same at the larger rank.
    growth = rank / first.rank
    alpha = first.alpha * (math.sqrt(growth) if first.use_rslora else growth)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name_or_path,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": first.dropout,
        "use_rslora": first.use_rslora,
        "target_modules": _ends_of(modules, found),
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
    }
    tensors: dict[str, np.ndarray] = {}
    for module, (a, b) in factors.items():
        missing = rank - len(a)
        tensors[_tensor_name(module, "lora_A")] = np.pad(a, ((0, missing), (0, 0)))
        tensors[_tensor_name(module, "lora_B")] = np.ascontiguousarray(np.pad(b, ((0, 0), (0, missing))))
    with replacing_files(user_path(folder)) as new:
        (new / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
        save_file(tensors, new / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        shutil.copymode(new / ADAPTER_CONFIG, new / ADAPTER_WEIGHTS)  # safetensors makes its files private


def load_adapter(model: Model, folder: str | Path) -> Model:
    """The model with the adapters of a folder that `peft` or `save_adapter` wrote; other arrays are shared.

    Raises:
      FileNotFoundError: the folder has no adapter.
      ValueError: the model has adapters already, the adapter asks for something that is not computed here, or its
        tensors do not fit; names each of them.
    """
    folder = user_path(folder)
    require_no_adapters(model)
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}; expected a folder written by peft or save_adapter.")
    config = read_adapter_config(folder)
    linears, modules = layer_linears(model), _modules(model)
    targets = _targets(folder, modules, config.target_modules)
    tensors = _read_tensors(folder, {path: linears[path] for path in targets}, modules, config.rank)

    def stacked(path: str, factor: str) -> Array:
        found = [tensors[_tensor_name(module.name, factor)] for module in modules[path].values()]
        if factor == "lora_B":
            found = [b[module.rows] for b, module in zip(found, modules[path].values())]
        return jnp.asarray(np.stack(found).reshape(*linears[path].weight.shape[:-2], *found[0].shape))

    return with_adapters(
        model,
        {
            path: LoraAdapter(
                a=stacked(path, "lora_A"),
                b=stacked(path, "lora_B"),
                alpha=config.alpha,
                dropout=config.dropout,
                use_rslora=config.use_rslora,
            )
            for path in targets
        },
    )


def _modules(model: LanguageModel) -> dict[str, Modules]:
    """The files' modules of every linear layer of the decoder layers."""
    weight_map, linears = model.weight_map, layer_linears(model)
    shapes = {f"{path}.weight": linear.weight.shape for path, linear in linears.items()}
    return {path: weight_map.modules(path, shapes) for path in linears}


def _factors_by_module(
    found: Mapping[str, LoraAdapter], modules: Mapping[str, Modules]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Both factors of every adapted module of the files, float32 ``[rank, in]`` and ``[out, rank]``."""
    of_layers: dict[str, list[tuple[np.ndarray, np.ndarray, Module]]] = {}
    for path, adapter in found.items():
        a, b = np.asarray(adapter.a), np.asarray(adapter.b)
        for at, module in modules[path].items():
            of_layers.setdefault(module.name, []).append((a[at], b[at], module))
    return {name: _joined(of_module) for name, of_module in of_layers.items()}


def _joined(parts: Sequence[tuple[np.ndarray, np.ndarray, Module]]) -> tuple[np.ndarray, np.ndarray]:
    """The factors of one adapter for a module that acts on each of its layers as that layer's own adapter does."""
    first_a, first_b, module = parts[0]
    # Layers whose adapters came from one module still share its first factor, unless they were trained.
    is_shared = all(np.array_equal(a, first_a) for a, _, _ in parts)
    ranks = [0 if is_shared else len(a) for a, _, _ in parts]
    starts = np.cumsum([0, *ranks])
    joined = np.zeros((module.size_out, len(first_a) if is_shared else starts[-1]), first_b.dtype)
    for (a, b, part), start in zip(parts, starts):
        joined[part.rows, start : start + len(a)] = b
    return first_a if is_shared else np.concatenate([a for a, _, _ in parts]), joined


def _tensor_name(module: str, factor: str) -> str:
    return f"{PREFIX}{module}.{factor}.weight"


def _ends_of(modules: Mapping[str, Modules], found: Collection[str]) -> list[str]:
    """The ``target_modules`` of the linear layers `found`: last words of module names, or whole names where needed.

    Whole names are needed where a module without an adapter ends in the same word.
    """
    adapted = {module.name for path in found for module in modules[path].values()}
    every = {module.name for of_path in modules.values() for module in of_path.values()}
    others = {name.rpartition(".")[2] for name in every - adapted}
    ends: dict[str, None] = {}
    for path in found:
        names = [module.name for module in modules[path].values()]
        words = dict.fromkeys(name.rpartition(".")[2] for name in names)
        ends |= words if others.isdisjoint(words) else dict.fromkeys(names)
    return list(ends)


def _targets(folder: Path, modules: Mapping[str, Modules], target_modules: str | list[str]) -> list[str]:
    """The paths of the linear layers that ``target_modules`` names.

    A list holds ends of module names; text is a regular expression for whole names.
    """
    everything = [module.name for of_path in modules.values() for module in of_path.values()]
    problems: list[str] = []
    if isinstance(target_modules, str):
        try:
            found = set(matching_names(target_modules, everything, whole=True))
        except ValueError as error:
            raise ValueError(f"{folder / ADAPTER_CONFIG}: target_modules: {error}") from error
    else:
        wanted, ends = set(target_modules), {name: _ends(name) for name in everything}
        found = {name for name in everything if not wanted.isdisjoint(ends[name])}
        unknown = wanted.difference(*ends.values())
        problems += [
            f"target module {plain(name)} is no linear layer of the decoder layers" for name in sorted(unknown)
        ]
    targets = []
    for path, of_path in modules.items():
        hits = sum(module.name in found for module in of_path.values())
        if hits:
            targets.append(path)
        if 0 < hits < len(of_path):
            kind = "layers" if len(next(iter(of_path))) < 2 else "experts of all layers"
            problems.append(f"{path} is adapted in {hits} of {len(of_path)} {kind}, not in all")
    if problems or not targets:
        adaptable = ", ".join(path for path in modules if modules[path])
        raise ValueError(
            f"{folder / ADAPTER_CONFIG} has target_modules {shown(target_modules)}; adapters here sit on "
            f"{adaptable}, each in all layers:\n  {listed(problems or ['none matches'])}"
        )
    return targets


def _ends(name: str) -> set[str]:
    """A dotted name and every end of it that begins after a dot."""
    parts = name.split(".")
    return {".".join(parts[start:]) for start in range(len(parts))}


def _read_tensors(
    folder: Path, targets: Mapping[str, Linear], modules: Mapping[str, Modules], rank: int
) -> dict[str, np.ndarray]:
    """Read the adapter's tensors, float32, only where the file's header has all of them in the right shapes."""
    expected: dict[str, tuple[int, ...]] = {}
    for path, linear in targets.items():
        for module in modules[path].values():
            expected[_tensor_name(module.name, "lora_A")] = (rank, linear.weight.shape[-1])
            expected[_tensor_name(module.name, "lora_B")] = (module.size_out, rank)
    file = folder / ADAPTER_WEIGHTS
    try:
        with safe_open(str(file), framework="numpy") as opened:
            present = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  no mapping
            shapes = {name: tuple(part.get_shape()) for name, part in present.items()}
            dtypes = {name: part.get_dtype() for name, part in present.items()}
            problems = [f"tensor {name} is missing" for name in sorted(expected.keys() - present.keys())]
            problems += [
                f"tensor {plain(name)} is not part of this adapter" for name in sorted(present.keys() - expected.keys())
            ]
            for name in sorted(expected.keys() & present.keys()):
                if shapes[name] != expected[name]:
                    problems.append(f"tensor {name} has shape {short_repr(shapes[name])}, expected {expected[name]}")
                if dtypes[name] not in FLOATS:
                    problems.append(f"tensor {name} is {dtypes[name]}, expected one of {', '.join(FLOATS)}")
            if not problems:
                with np.errstate(over="ignore"):  # infinity is reported below
                    tensors = {name: opened.get_tensor(name).astype(np.float32) for name in expected}
                problems = [
                    f"tensor {name} holds numbers that are not finite in float32"
                    for name, values in tensors.items()
                    if not np.isfinite(values).all()
                ]
    except SafetensorError as error:
        raise ValueError(f"{file} is not a readable safetensors file ({error}).") from error
    if problems:
        raise ValueError(f"{folder} does not fit the model and its own {ADAPTER_CONFIG}:\n  {listed(problems)}")
    return tensors

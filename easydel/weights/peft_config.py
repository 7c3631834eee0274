"""Read the settings of a PEFT adapter from ``adapter_config.json``, and refuse those that are not computed here."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from easydel.errors import listed, plain, short_repr, shown
from easydel.layers.lora import LARGEST_ALPHA
from easydel.paths import user_path
from easydel.weights.files import read_json
from easydel.weights.hugging_face import CONFIG

ADAPTER_CONFIG = "adapter_config.json"
# These keys may have any value: the first are read below, the second change nothing that a loaded adapter computes.
# Every other key must be off, so that a setting of a later PEFT is refused rather than ignored.
READ = {
    "peft_type",
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "use_rslora",
    "init_lora_weights",
    "base_model_name_or_path",
    "revision",
}
WITHOUT_EFFECT = {
    "auto_mapping",
    "eva_config",  # of an initialisation that leaves the base's weights as they are
    "inference_mode",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "runtime_config",
    "task_type",
}
OFF: tuple[Any, ...] = (None, False, {}, [], "", "none")
# Initialisations that leave the base's weights as they are; the others (PiSSA, OLoRA, LoftQ, …) replace them.
HARMLESS_INITIALISATIONS: tuple[Any, ...] = (None, True, False, "gaussian", "orthogonal", "eva")
REQUIRED = ("r", "lora_alpha", "target_modules")
LONGEST_NAME = 4096


class AdapterConfig(NamedTuple):
    """The settings of an ``adapter_config.json`` that decide what the adapter computes."""

    rank: int
    alpha: float
    dropout: float
    use_rslora: bool
    target_modules: str | list[str]


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Read the ``adapter_config.json`` of a folder.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: lists every key that is missing, wrong, or not computed here.
    """
    config: dict[str, Any] = read_json(folder / ADAPTER_CONFIG)
    problems = [f"{name} is missing" for name in REQUIRED if config.get(name) is None]

    def check(name: str, is_right: bool, expected: str) -> None:
        if config.get(name) is not None and not is_right:
            problems.append(f"{name} is {short_repr(config[name])}, expected {expected}")

    rank: Any = config.get("r")
    alpha: Any = config.get("lora_alpha")
    targets: Any = config.get("target_modules")
    dropout: Any = config.get("lora_dropout")
    initialisation = config.get("init_lora_weights")
    check("r", isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1, "a whole number of at least 1")
    check("lora_alpha", _is_number(alpha) and 0 < alpha <= LARGEST_ALPHA, "a number above 0")
    check("lora_dropout", _is_number(dropout) and 0 <= dropout < 1, "a share from 0 to below 1")
    check("use_rslora", isinstance(config.get("use_rslora"), bool), "true or false")
    check(
        "target_modules",
        bool(targets) and (isinstance(targets, str) or (isinstance(targets, list) and all(map(_is_name, targets)))),
        "the names of modules or a regular expression",
    )
    if config.get("peft_type") != "LORA":
        problems.append(f"peft_type is {short_repr(config.get('peft_type'))}, expected 'LORA'")
    if initialisation not in HARMLESS_INITIALISATIONS:
        problems.append(f"init_lora_weights is {short_repr(initialisation)}, which changes the base's weights too")
    problems += [
        f"{plain(name)} is {short_repr(value)}, which is not computed here"
        for name, value in config.items()
        if name not in READ | WITHOUT_EFFECT and value not in OFF
    ]
    if problems:
        raise ValueError(f"{folder / ADAPTER_CONFIG} cannot be used:\n  {listed(problems)}")
    return AdapterConfig(rank, float(alpha), float(dropout or 0), bool(config.get("use_rslora")), targets)


def is_adapter_folder(folder: Path) -> bool:
    """Whether a folder holds an adapter and no whole model."""
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / CONFIG).exists()


def base_of_adapter(folder: Path) -> str:
    """The model an adapter was made for, as its ``adapter_config.json`` names it.

    Raises:
      ValueError: it names no model, a revision of one, or another adapter; or the adapter cannot be used at all.
    """
    read_adapter_config(folder)  # before a base is loaded in vain
    file, config = folder / ADAPTER_CONFIG, read_json(folder / ADAPTER_CONFIG)
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    advice = "load that model and call its load_adapter with this folder."
    if base is None or base == "":
        raise ValueError(f"{file} has no base_model_name_or_path, so the model it was made for is not known: {advice}")
    if not _is_name(base):
        raise ValueError(f"{file} has base_model_name_or_path {shown(base)}, expected a folder or a hub id: {advice}")
    if revision not in (None, "main"):
        raise ValueError(f"{file} was made for revision {shown(revision)} of {shown(base)}: {advice}")
    if is_adapter_folder(user_path(base)):
        raise ValueError(
            f"{file} names {shown(base)} as its base_model_name_or_path, which is an adapter itself, expected a whole "
            "model. Merge that adapter into its model first (merge_lora, save_pretrained), or correct the name."
        )
    return base


def _is_name(value: Any) -> bool:
    """True where a value of a file can be a path or a hub id at all."""
    return isinstance(value, str) and 0 < len(value) <= LONGEST_NAME and value.isprintable()


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)

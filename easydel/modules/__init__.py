"""Register the model families: one decoder, one file per family, and the table that picks a family by its name."""

from __future__ import annotations

from typing import TypeVar

from easydel.infra.base_module import EasyDeLBaseModule
from easydel.modules.llama import LlamaForCausalLM
from easydel.modules.mistral import MistralForCausalLM
from easydel.modules.qwen2 import Qwen2ForCausalLM
from easydel.modules.qwen3 import Qwen3ForCausalLM

Family = TypeVar("Family", bound=type[EasyDeLBaseModule])
# model_type of config.json -> the class that reads it.
FAMILIES: dict[str, type[EasyDeLBaseModule]] = {
    family.model_type: family for family in (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)
}


def register_family(family: Family) -> Family:
    """Let `AutoEasyDeLModelForCausalLM` load a family of your own; works as a decorator of the class.

    Raises:
      ValueError: another class has this ``model_type``.

    Example:
      >>> register_family(LlamaForCausalLM) is FAMILIES["llama"]
      True
    """
    present = FAMILIES.setdefault(family.model_type, family)
    if present is not family:
        raise ValueError(f'{family.__name__} has model_type "{family.model_type}", which {present.__name__} reads.')
    return family

"""Pick the family from ``config.json``."""

from __future__ import annotations

from typing import Any

from easydel.infra.base_module import EasyDeLBaseModule
from easydel.infra.pretrained import open_checkpoint
from easydel.modules.llama import LlamaForCausalLM
from easydel.modules.mistral import MistralForCausalLM
from easydel.modules.qwen2 import Qwen2ForCausalLM
from easydel.modules.qwen3 import Qwen3ForCausalLM

FAMILIES: dict[str, type[EasyDeLBaseModule]] = {
    family.model_type: family for family in (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)
}


class AutoEasyDeLModelForCausalLM:
    """Loads a model of whichever family its ``config.json`` names."""

    @classmethod
    def from_pretrained(cls, name_or_path: str, **options: Any) -> EasyDeLBaseModule:
        """`EasyDeLBaseModule.from_pretrained` of the right family; `options` are the same.

        Raises:
          ValueError: ``config.json`` names a family that is not supported; the error lists those that are.
        """
        files = open_checkpoint(name_or_path)
        model_type = files.config.get("model_type")
        if model_type not in FAMILIES:
            raise ValueError(f'{name_or_path} has model_type "{model_type}"; supported are {", ".join(FAMILIES)}.')
        return FAMILIES[model_type].from_checkpoint(files, **options)

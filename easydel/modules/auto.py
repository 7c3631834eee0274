"""Load a model of the family that its ``config.json`` names."""

from __future__ import annotations

from typing import Any

from easydel.errors import shown
from easydel.infra.base_module import EasyDeLBaseModule
from easydel.modules import FAMILIES
from easydel.weights.peft_config import base_of_adapter, is_adapter_folder
from easydel.weights.pretrained import local_path, open_checkpoint


class AutoEasyDeLModelForCausalLM:
    """Loads a model of whichever family its ``config.json`` names."""

    @classmethod
    def from_pretrained(cls, name_or_path: str, **options: Any) -> EasyDeLBaseModule:
        """Load a model by `EasyDeLBaseModule.from_pretrained` of its family.

        A folder with a PEFT adapter gives the model that the adapter was made for, with the adapter on.

        Args:
          name_or_path: folder, ``org/name`` or ``.gguf`` file.
          **options: those of `EasyDeLBaseModule.from_checkpoint`.

        Raises:
          FileNotFoundError: there is no such model.
          ValueError: ``config.json`` names a family that is not supported (the error lists those that are), or an
            adapter does not name the model it was made for.
        """
        path = local_path(name_or_path)
        if is_adapter_folder(path):
            return cls.from_pretrained(base_of_adapter(path), **options).load_adapter(path)
        files = open_checkpoint(path)
        model_type = files.config.get("model_type")
        if not isinstance(model_type, str) or model_type not in FAMILIES:
            raise ValueError(f"{name_or_path} has model_type {shown(model_type)}; supported are {', '.join(FAMILIES)}.")
        return FAMILIES[model_type].from_checkpoint(files, **options)

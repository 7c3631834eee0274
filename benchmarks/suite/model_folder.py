"""SmolLM2-135M-Instruct as the Hugging Face folder that every contender loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from easydel import AutoEasyDeLModelForCausalLM, load_tokenizer
from easydel.weights.download import smollm2_135m_instruct


def write_model_folder(folder: Path) -> Any:
    """Write float32 safetensors and the tokenizer into `folder`; gives the tokenizer."""
    source = smollm2_135m_instruct()
    AutoEasyDeLModelForCausalLM.from_pretrained(source).save_pretrained(folder)
    tokenizer = load_tokenizer(source)
    tokenizer.save_pretrained(folder)
    return tokenizer

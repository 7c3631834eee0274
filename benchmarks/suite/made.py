"""Small random models and made rows, in the sizes that are swept."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.suite.rows import TextRow
from easydel import LlamaForCausalLM

# What stays where something else is swept.
BASE = {"length": 512, "batch": 4, "vocabulary": 32768, "prompt_share": 0.5}
SWEEPS: dict[str, tuple[float, ...]] = {
    "length": (64, 128, 256, 512, 1024, 2048, 4096),
    "batch": (1, 2, 4, 8, 16, 32, 64),
    "vocabulary": (8192, 16384, 32768, 65536, 131072, 262144),
    "prompt_share": (0, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9),
}
STOP, STOP_ID = "<end>", 1
SPECIAL_IDS = 8  # ids below are no words of a made row


def small_model(vocabulary: int, length: int, width: int = 256) -> LlamaForCausalLM:
    """Four layers of SmolLM2's proportions with random weights; `width` is a multiple of 128."""
    config: dict[str, Any] = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": 4,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 128,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "max_position_embeddings": 2 * length,
    }
    return LlamaForCausalLM.init(LlamaForCausalLM.read_config(config), jax.random.key(0))


def tokenizer_of_ids(vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose words say their id, with white space between them."""
    words = {"<pad>": 0, STOP: STOP_ID} | {f"t{token}": token for token in range(2, vocabulary)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token=STOP)


def made_row(random: np.random.Generator, length: int, prompt_share: float, vocabulary: int) -> dict[str, list[int]]:
    """Random token ids: both completions with their prompt are `length` tokens, of which the prompt has its share.

    A prompt has one token at least; a completion ends with the stop token.
    """
    prompt = max(1, round(length * prompt_share))
    row = {
        field: random.integers(SPECIAL_IDS, vocabulary, size).tolist()
        for field, size in (("prompt", prompt), ("chosen", length - prompt), ("rejected", length - prompt))
    }
    for side in ("chosen", "rejected"):
        row[side][-1] = STOP_ID
    return row


def as_text(row: dict[str, list[int]]) -> TextRow:
    """The same row in the words of `tokenizer_of_ids`."""

    def words(ids: list[int]) -> str:
        return " ".join(STOP if token == STOP_ID else f"t{token}" for token in ids)

    prompt, chosen, rejected = row["prompt"], row["chosen"], row["rejected"]
    # The space after the prompt parts the two, whoever joins them.
    return TextRow(f"{words(prompt)} ", words(chosen), words(rejected), (len(prompt), len(chosen), len(rejected)))

"""Random models and made rows, in the sizes that are compared."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.harness import Task
from benchmarks.rows import TextRow, write_rows
from easydel import LlamaForCausalLM

# What stays where something else is swept, and both ends of every sweep.
BASE = {"length": 512, "batch": 4, "vocabulary": 32768, "prompt_share": 0.5}
SWEEPS: dict[str, tuple[float, float]] = {
    "length": (64, 4096),
    "batch": (1, 64),
    "vocabulary": (8192, 262144),
    "prompt_share": (0, 0.9),
}
STOP, STOP_ID = "<end>", 1
SPECIAL_IDS = 8  # ids below are no words of a made row


@dataclasses.dataclass(frozen=True)
class Shape:
    """A random model of Llama's kind, and the rows that it is trained on; by default four layers of SmolLM2's width.

    Attributes:
      width: of the hidden states, a multiple of 128 where `heads` is not given.
      heads: of queries and of keys; None gives every 64 and every 128 of the width one.
      length: tokens of a prompt with one completion.
      prompt_share: of the length.
    """

    width: int = 256
    mlp: int | None = None
    layers: int = 4
    heads: tuple[int, int] | None = None
    vocabulary: int = 32768
    length: int = 512
    prompt_share: float = 0.5


# The sizes of Qwen2's two smallest models, for devices that want more than the small ones.
SHAPES = {
    "small": Shape(),
    "0.5b": Shape(896, 4864, 24, (14, 2), 151936),
    "1.5b": Shape(1536, 8960, 28, (12, 2), 151936),
}


def random_model(shape: Shape) -> LlamaForCausalLM:
    """The model of a shape, always the same one."""
    heads, kv_heads = shape.heads or (shape.width // 64, shape.width // 128)
    config: dict[str, Any] = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "intermediate_size": shape.mlp or 3 * shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "max_position_embeddings": 2 * shape.length,
    }
    return LlamaForCausalLM.init(LlamaForCausalLM.read_config(config), jax.random.key(0))


def made_task(
    folder: Path, shape: Shape, pairs: int, updates: int, platform: str = "cpu"
) -> tuple[Task, list[TextRow]]:
    """The model of a shape and its rows, written below `folder`."""
    random, rows_file, model = np.random.default_rng(0), folder / "rows.jsonl", folder / "model"
    rows = [
        as_text(made_row(random, shape.length, shape.prompt_share, shape.vocabulary)) for _ in range(pairs * updates)
    ]
    write_rows(rows, rows_file)
    random_model(shape).save_pretrained(model)
    tokenizer_of_ids(shape.vocabulary).save_pretrained(model)
    return Task(rows_file, model, shape.length, pairs, updates, 1e-4, platform), rows


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

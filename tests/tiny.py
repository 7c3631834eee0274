"""Tiny models, a tokenizer of characters, and rows: importing this changes no setting."""

from __future__ import annotations

import numpy as np
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from easydel.data.tree import PreferencePair
from easydel.infra.base_config import EasyDeLBaseConfig

VOCABULARY = 64


def tiny_config(**changes) -> EasyDeLBaseConfig:
    values = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "layer_windows": (None, None),
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
    }
    return EasyDeLBaseConfig(**(values | changes))


def random_pair(rng: np.random.Generator, index: int, longest: int = 40) -> PreferencePair:
    prompt, chosen, rejected = rng.integers(1, longest, 3)
    ids = [rng.integers(1, VOCABULARY, size).astype(np.int32) for size in (prompt, chosen, rejected)]
    masks = [rng.random(size) < 0.8 for size in (chosen, rejected)]
    for mask in masks:
        mask[-1] = True
    return PreferencePair(*ids, *masks, index=index)


CHARACTERS = " abcdefghijklmnopqrstuvwxyz.,?!:'-0123456789ABT\n"
SPECIAL = ["<pad>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, and the special tokens of a chat model."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *CHARACTERS])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=None))
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"]
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def make_rows() -> list[dict]:
    """Twelve chat rows; the chosen answer says please."""
    things = [
        "tea",
        "the bus",
        "a map",
        "rain",
        "bread",
        "my cat",
        "a song",
        "the sea",
        "chess",
        "snow",
        "a pen",
        "ink",
    ]
    return [
        {
            "prompt": [{"role": "user", "content": f"tell me about {thing}"}],
            "chosen": [{"role": "assistant", "content": f"please, {thing} is good."}],
            "rejected": [{"role": "assistant", "content": f"no. {thing}? no idea, ask them."}],
        }
        for thing in things
    ]


class WrappedTokenizer:
    """A tokenizer that is no `transformers` one: an object with the same few methods."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def __len__(self):
        return len(self._tokenizer)

    def __call__(self, text, **kwargs):
        return self._tokenizer(text, **kwargs)

"""Tiny models and pairs that many tests share."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tiny programs run once: compiling them is most of the suite's time, and half of that is LLVM's optimiser.
FAST_COMPILATION = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FAST_COMPILATION}"

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from easydel.data.preference import PreferencePair
from easydel.infra.base_config import EasyDeLBaseConfig
from easydel.infra.download import DownloadError, smollm2_135m_instruct
from easydel.infra.gguf_tokenizer import tokenizer_from_gguf
from easydel.modules.llama import LlamaForCausalLM

VOCABULARY = 64

# No test touches the user's own cache; each has one of its own, so that none profits from what another one kept.
USERS_CACHE = os.environ.get("XDG_CACHE_HOME")
_session_cache = tempfile.TemporaryDirectory(prefix="easydel-tests-")
os.environ["XDG_CACHE_HOME"] = _session_cache.name


@pytest.fixture(autouse=True)
def cache_of_this_test(tmp_path_factory, monkeypatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


# Every trainer compiles its steps anew; in a test session most of them are the same program.
_compiled = tempfile.TemporaryDirectory(prefix="easydel-tests-")
jax.config.update("jax_compilation_cache_dir", _compiled.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


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


@pytest.fixture(scope="session")
def tiny_model() -> LlamaForCausalLM:
    return LlamaForCausalLM.init(tiny_config(), jax.random.key(0))


@pytest.fixture(scope="session")
def pairs() -> list[PreferencePair]:
    rng = np.random.default_rng(0)
    return [random_pair(rng, index) for index in range(7)]


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


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def rows() -> list[dict]:
    return make_rows()


@pytest.fixture(scope="session")
def smollm2():
    """The real SmolLM2-135M-Instruct and its tokenizer."""
    try:
        with pytest.MonkeyPatch.context() as patch:
            # A download of 90 MB is worth keeping.
            if USERS_CACHE is None:
                patch.delenv("XDG_CACHE_HOME")
            else:
                patch.setenv("XDG_CACHE_HOME", USERS_CACHE)
            path = smollm2_135m_instruct()
        model = LlamaForCausalLM.from_pretrained(path, dtype=jnp.float32)
    except (DownloadError, ImportError) as error:
        pytest.skip(f"SmolLM2 cannot be had here: {error}")
    # The golden numbers start from the weights as a bfloat16 folder holds them.
    model = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), model)
    return model, tokenizer_from_gguf(path)

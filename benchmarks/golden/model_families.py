"""Save tiny random models of every family with the logits and greedy tokens that transformers gives for them.

Each folder under tests/golden/families is a Hugging Face folder of float32 weights beside `golden.npz`:
input_ids [2, 24], logits [2, 24, vocab] float32, generated [2, 8] greedy tokens that follow the first 16 of input_ids.
Every special feature is proved to matter: the same weights without it give other logits.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden"
VOCABULARY, ROWS, LENGTH, PROMPT, NEW_TOKENS = 96, 2, 24, 16, 8

# A feature counts only if it moves some logit by far more than any float32 disagreement between implementations.
VISIBLE = 0.05
# Greedy tokens are a fair golden only where the best token leads clearly.
CLEAR_LEAD = 0.01

SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}

# At theta 100 head_dim 8 has the wavelengths 6.3, 19.9, 62.8 and 198.7 positions. With 32 original positions the first
# is below 32 / high_freq_factor (kept), the second in between (blended), the rest above 32 / low_freq_factor (scaled).
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def plain_rope(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


@dataclass(frozen=True)
class Family:
    """A golden model and, by feature name, what takes that feature away: other config fields, or a weight edit.

    The seed is one for which greedy decoding is unambiguous; `golden` refuses the others.
    """

    model: type[PreTrainedModel]
    config: PretrainedConfig
    without: dict[str, dict[str, Any] | Callable[[str, torch.Tensor], torch.Tensor]]
    seed: int
    max_shard_size: str = "1GB"


def ones_where(part: str) -> Callable[[str, torch.Tensor], torch.Tensor]:
    """Return an edit that turns the weights whose name contains `part` into ones."""
    return lambda name, weight: torch.ones_like(weight) if part in name else weight


def zeros_where(part: str) -> Callable[[str, torch.Tensor], torch.Tensor]:
    """Return an edit that turns the weights whose name contains `part` into zeros."""
    return lambda name, weight: torch.zeros_like(weight) if part in name else weight


FAMILIES: dict[str, Family] = {
    "llama": Family(
        LlamaForCausalLM,
        # An epsilon this large makes its value, and its place inside the root, visible.
        LlamaConfig(**SHAPE, rms_norm_eps=1e-2, rope_parameters=plain_rope(500.0)),
        {
            "rms_norm_eps": {"rms_norm_eps": 1e-6},
            "rope_theta": {"rope_parameters": plain_rope(10000.0)},
            "norm weights": ones_where("norm.weight"),
        },
        seed=1,
        max_shard_size="40KB",
    ),
    "llama3_rope": Family(
        LlamaForCausalLM,
        LlamaConfig(**SHAPE, rope_parameters=LLAMA3_ROPE),
        {
            "llama3 scaling": {"rope_parameters": plain_rope(100.0)},
            "blended middle band": {"rope_parameters": {**LLAMA3_ROPE, "high_freq_factor": 1.0001}},
        },
        seed=1,
    ),
    "llama_bias": Family(
        LlamaForCausalLM,
        LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True, rope_parameters=plain_rope(10000.0)),
        {
            "attention bias": {"attention_bias": False},
            "mlp bias": {"mlp_bias": False},
            "output projection bias": zeros_where("o_proj.bias"),
        },
        seed=1,
    ),
    "mistral": Family(
        MistralForCausalLM,
        MistralConfig(**SHAPE, sliding_window=4, rope_parameters=plain_rope(10000.0)),
        {"sliding window": {"sliding_window": None}, "window of four": {"sliding_window": 5}},
        seed=4,
    ),
    "qwen2": Family(
        Qwen2ForCausalLM,
        Qwen2Config(**SHAPE, rope_parameters=plain_rope(10000.0)),
        {"q, k, v bias": zeros_where("_proj.bias"), "key bias": zeros_where("k_proj.bias")},
        seed=2,
    ),
    "qwen2_sliding": Family(
        Qwen2ForCausalLM,
        Qwen2Config(
            **{**SHAPE, "num_hidden_layers": 3, "intermediate_size": 48},
            use_sliding_window=True,
            sliding_window=4,
            max_window_layers=1,
            rope_parameters=plain_rope(10000.0),
        ),
        {
            "sliding layers": {"use_sliding_window": False, "layer_types": ["full_attention"] * 3},
            "full first layer": {"layer_types": ["sliding_attention"] * 3},
        },
        seed=1,
    ),
    "qwen3": Family(
        Qwen3ForCausalLM,
        # 4 heads of 16 are 64 wide, twice the hidden size.
        Qwen3Config(**{**SHAPE, "tie_word_embeddings": True}, head_dim=16, rope_parameters=plain_rope(10000.0)),
        {"query norm": ones_where("q_norm"), "key norm": ones_where("k_norm")},
        seed=3,
    ),
}


def draw_weights(model: PreTrainedModel, seed: int) -> None:
    """Fill every parameter in place with random values for which nothing is trivial and logits are O(1)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5, generator=generator)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.3, generator=generator)
            else:
                parameter.normal_(0.0, 0.25, generator=generator)


def eager(family: Family, config: PretrainedConfig) -> PreTrainedModel:
    """Return an uninitialised float32 model in evaluation mode with plain attention."""
    return family.model._from_config(config, attn_implementation="eager", dtype=torch.float32).eval()


def without(
    family: Family, model: PreTrainedModel, change: dict[str, Any] | Callable[[str, torch.Tensor], torch.Tensor]
) -> PreTrainedModel:
    """Return a copy of the model with one feature taken away, all other weights the same."""
    weights = model.state_dict()
    if callable(change):
        config = family.config
        weights = {name: change(name, weight) for name, weight in weights.items()}
    else:
        config = type(family.config)(**{**family.config.to_dict(), **change})
    copy = eager(family, config)
    missing, surplus = copy.load_state_dict(weights, strict=False)
    if missing or any(not name.endswith("bias") for name in surplus):
        raise ValueError(f"{family.model.__name__}: missing {missing}, surplus {surplus}")
    return copy


@torch.no_grad()
def golden(name: str, family: Family, model: PreTrainedModel) -> dict[str, np.ndarray]:
    """Return inputs, logits and greedy tokens, once every feature is proved visible and every choice clear."""
    generator = torch.Generator().manual_seed(family.seed)
    input_ids = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=generator)
    logits = model(input_ids).logits
    assert logits.dtype == torch.float32 and 0.5 < float(logits.std()) < 5, f"{name}: logit std {logits.std()}"
    for feature, change in family.without.items():
        moved = float((without(family, model, change)(input_ids).logits - logits).abs().max())
        assert moved > VISIBLE, f"{name}: taking away {feature!r} moves the logits by {moved} only"
        print(f"{name}: without {feature}: logits move by up to {moved:.3f}")
    sequences = model.generate(
        input_ids[:, :PROMPT],
        attention_mask=torch.ones(ROWS, PROMPT, dtype=torch.long),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        pad_token_id=0,
    )
    generated = sequences[:, PROMPT:]
    assert generated.shape == (ROWS, NEW_TOKENS), f"{name}: generation stopped early, choose another seed"
    leaders = model(sequences[:, :-1]).logits[:, PROMPT - 1 :].topk(2).values
    lead = float((leaders[..., 0] - leaders[..., 1]).min())
    assert lead > CLEAR_LEAD, f"{name}: the best token leads by {lead} only, choose another seed"
    assert not bool((generated == family.config.eos_token_id).any()), f"{name}: the stop token came up"
    return {
        "input_ids": input_ids.numpy().astype(np.int32),
        "logits": logits.numpy(),
        "generated": generated.numpy().astype(np.int32),
    }


def main() -> None:
    """Write every family's folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=GOLDEN / "families")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name, family in FAMILIES.items():
        model = eager(family, family.config)
        draw_weights(model, family.seed)
        arrays = golden(name, family, model)
        folder = arguments.output / name
        model.save_pretrained(folder, max_shard_size=family.max_shard_size)
        np.savez_compressed(folder / "golden.npz", **arrays)
        size = sum(file.stat().st_size for file in folder.iterdir())
        print(f"{name}: {model.num_parameters()} parameters, {size / 1000:.0f} kB")


if __name__ == "__main__":
    main()

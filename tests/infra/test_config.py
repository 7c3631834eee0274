"""What ``config.json`` may say: real files are read, everything else is refused in one short error."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from pathlib import Path

import jax
import pytest
import transformers

from easydel import AutoEasyDeLModelForCausalLM, LlamaForCausalLM
from easydel.infra.base_module import EasyDeLBaseModule
from easydel.infra.rotary_config import RotaryScaling
from easydel.modules import FAMILIES
from tests.infra.config_mutations import mutated
from tests.tiny import tiny_config

GOLDEN = Path(__file__).parents[1] / "golden" / "families"
FOLDERS = [folder for folder in sorted(GOLDEN.iterdir()) if (folder / "model.safetensors").exists()]
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 128,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
COMMON = {"initializer_range": 0.02, "torch_dtype": "bfloat16", "transformers_version": "4.43.0", "use_cache": True}
# The keys that the hub's files have beside the sizes.
HUB = {
    "Llama 1": {"model_type": "llama", "max_sequence_length": 2048, "pad_token_id": -1, "bos_token_id": 1},
    "Llama 2": {"model_type": "llama", "pretraining_tp": 1, "rope_scaling": None, "_name_or_path": "x"},
    "Llama 3.1": {
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "pretraining_tp": 1,
        "rope_scaling": LLAMA3,
        "rope_theta": 500000.0,
        "eos_token_id": [128001, 128008, 128009],
    },
    "Llama 3.2": {"model_type": "llama", "head_dim": 8, "rope_scaling": LLAMA3 | {"factor": 32.0}, "rope_theta": 5e5},
    "LongChat": {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 8.0}},
    "SmolLM2": {
        "model_type": "llama",
        "is_llama_config": True,
        "rope_interleaved": False,
        "rope_theta": 100000,
        "head_dim": None,
        "transformers.js_config": {"dtype": "q4", "kv_cache_dtype": {"q4f16": "float16"}},
        "quantization_config": None,
    },
    "Mistral v0.1": {"model_type": "mistral", "sliding_window": 4096, "rope_theta": 10000.0},
    "Mistral v0.3": {"model_type": "mistral", "sliding_window": None, "rope_theta": 1000000.0},
    "Qwen2": {
        "model_type": "qwen2",
        "attention_dropout": 0.0,
        "max_window_layers": 24,
        "sliding_window": 32768,
        "use_sliding_window": False,
        "rope_theta": 1000000.0,
    },
    "Qwen2.5-Math": {"model_type": "qwen2", "use_mrope": False, "sliding_window": 4096, "use_sliding_window": False},
    "Qwen2.5-1M": {"model_type": "qwen2", "dual_chunk_attention_config": {"chunk_size": 262144}},
    "Qwen3": {
        "model_type": "qwen3",
        "attention_bias": False,
        "head_dim": 128,
        "max_window_layers": 36,
        "rope_scaling": None,
        "sliding_window": None,
        "use_sliding_window": False,
    },
    "a finetune": {
        "model_type": "llama",
        "unsloth_version": "2025.1",
        "_attn_implementation_autoset": True,
        "auto_map": {"AutoConfig": "x.Y"},
        "temperature": 0.6,
        "id2label": {"0": "LABEL_0"},
        "pad_token_id": None,
        "quantization": {},
        "some_feature": False,
    },
}


def read(raw: dict):
    return FAMILIES[raw["model_type"]].read_config(json.loads(json.dumps(raw)))


@pytest.mark.parametrize("name", HUB)
def test_a_config_of_the_hub_is_read_without_complaint(name):
    config = read(SIZES | COMMON | HUB[name])
    assert config.num_key_value_heads == 2
    assert config.head_dim == (HUB[name].get("head_dim") or 8)


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
@pytest.mark.parametrize(
    "rope", [None, {"rope_type": "linear", "factor": 4.0}, LLAMA3], ids=["plain", "linear", "llama3"]
)
@pytest.mark.parametrize("write", ["to_dict", "to_diff_dict"])
def test_a_config_that_transformers_writes_is_read_as_transformers_means_it(family, rope, write):
    options = {} if rope is None else {"rope_parameters": rope | {"rope_theta": 5e5}}
    theirs = getattr(transformers, f"{family}Config")(**options, max_position_embeddings=16384)
    sizes = {name: getattr(theirs, name) for name in SIZES}  # to_diff_dict leaves out what is the default
    config = read(sizes | getattr(theirs, write)())
    assert config.head_dim == getattr(theirs, "head_dim", theirs.hidden_size // theirs.num_attention_heads)
    assert config.num_key_value_heads == theirs.num_key_value_heads
    assert set(config.layer_windows) == {4096 if family == "Mistral" else None}
    assert config.rope_theta == (10000.0 if rope is None else 5e5)
    assert (config.rope_scaling.factor if config.rope_scaling else None) == (rope["factor"] if rope else None)


def test_windows_of_upper_layers_are_those_of_transformers():
    theirs = transformers.Qwen2Config(use_sliding_window=True, num_hidden_layers=30)
    expected = tuple(4096 if kind == "sliding_attention" else None for kind in theirs.layer_types)
    assert read(SIZES | {"model_type": "qwen2", "use_sliding_window": True, "num_hidden_layers": 30}).layer_windows == (
        expected
    )


@pytest.mark.parametrize("old_first", [True, False])
def test_two_spellings_of_the_rotary_settings_may_stand_beside_each_other_if_they_agree(old_first):
    old = {"rope_scaling": {"type": "linear", "factor": 4}, "rope_theta": 5e5}
    new = {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500000}}
    raw = SIZES | {"model_type": "llama"} | (old | new if old_first else new | old)
    config = read(raw)
    assert (config.rope_theta, config.rope_scaling) == (5e5, RotaryScaling("linear", 4.0))


WRONG = [
    ({"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_parameters": {"rope_theta": 1e4}}, "rope_scaling"),
    (
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"type": "linear", "factor": 4.0}},
        "say di",
    ),
    ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, '"rope_theta": 10000.0 and another'),
    ({"rope_scaling": {"rope_type": "linear", "type": "llama3", "factor": 4.0}}, "two kinds"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, '"factor": 0, expected a number from 1'),
    ({"rope_scaling": {"rope_type": "linear", "factor": -4.0}}, '"factor": -4.0'),
    ({"rope_scaling": {"rope_type": "linear"}}, 'lacks "factor"'),
    ({"rope_scaling": LLAMA3 | {"factor": float("nan")}}, '"factor": NaN'),
    ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, '"high_freq_factor": 4.0'),
    ({"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 0}}, "original_max_position_embeddings"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, 'rope_type "yarn"'),
    ({"rope_scaling": {"rope_type": "default", "factor": 2.0}}, '"factor": 2.0'),
    ({"rope_scaling": {"rope_type": "default", "mrope_section": [16, 24]}}, '"mrope_section"'),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, '"full_attention"'),
    ({"rope_parameters": [None]}, "expected a JSON object"),
    ({"rope_theta": [[]]}, '"rope_theta": [[]]'),
    ({"rope_theta": 0}, '"rope_theta": 0'),
    ({"rms_norm_eps": -1}, '"rms_norm_eps": -1'),
    ({"rms_norm_eps": "1e-5"}, '"rms_norm_eps": "1e-5"'),
    ({"rms_norm_eps": None}, 'lacks "rms_norm_eps" (null)'),
    ({"num_hidden_layers": 2**31}, '"num_hidden_layers": 2147483648'),
    ({"num_hidden_layers": 2**64}, '"num_hidden_layers": 18446744073709551616'),
    ({"num_hidden_layers": 10**400}, "…, expected a whole number"),
    ({"num_hidden_layers": 2.0}, '"num_hidden_layers": 2.0'),
    ({"num_hidden_layers": True}, '"num_hidden_layers": true'),
    ({"num_attention_heads": 0}, '"num_attention_heads": 0'),
    ({"num_attention_heads": 5}, "no multiple of"),
    ({"num_key_value_heads": 3}, "num_attention_heads=4 is no multiple of num_key_value_heads=3"),
    ({"num_key_value_heads": "1e400"}, '"num_key_value_heads": "1e400"'),
    ({"head_dim": 7}, "head_dim=7 is odd"),
    ({"head_dim": {"a": 1}}, '"head_dim": {"a": 1}'),
    ({"vocab_size": 2**40}, '"vocab_size"'),
    ({"initializer_range": 10**30}, '"initializer_range"'),
    ({"tie_word_embeddings": "false"}, "expected true or false"),
    ({"hidden_act": "gelu"}, '"hidden_act": "gelu"'),
    ({"attention_dropout": 0.1}, '"attention_dropout": 0.1'),
    ({"partial_rotary_factor": 0.5}, '"partial_rotary_factor": 0.5'),
    ({"is_causal": False}, '"is_causal": false'),
    ({"sliding_window": 16}, '"sliding_window": 16'),
    ({"layer_types": ["sliding_attention"] * 2}, '"layer_types"'),
    ({"logit_scale": 0.5}, '"logit_scale": 0.5, which is not read here'),
    ({"num_local_experts": 8}, '"num_local_experts": 8'),
    ({"\x1b[31m": 1}, r'"\u001b[31m": 1'),
    ({"model_type": "mistral", "layer_types": ["full_attention", "sliding_attention"]}, '"layer_types" other than'),
    ({"model_type": "mistral", "sliding_window": 0}, '"sliding_window": 0'),
    ({"model_type": "mistral", "attention_bias": True}, '"attention_bias": true'),
    ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 2}, "no window"),
    ({"model_type": "qwen2", "layer_types": ["full_attention"]}, '1 "layer_types" for "num_hidden_layers": 2'),
    ({"model_type": "qwen2", "layer_types": 10**30}, '"layer_types"'),
    ({"model_type": "qwen2", "layer_types": [["full_attention"]] * 2}, '"layer_types"'),
    ({"model_type": "qwen3", "max_window_layers": -1}, '"max_window_layers": -1'),
]


@pytest.mark.parametrize("change, words", WRONG, ids=lambda value: value if isinstance(value, str) else "")
def test_a_value_that_cannot_be_computed_is_named(change, words):
    raw = SIZES | {"model_type": "llama"} | change
    with pytest.raises(ValueError) as error:
        FAMILIES[raw["model_type"]].read_config(raw)
    assert words in str(error.value)
    assert len(str(error.value)) < 600


def test_an_absent_or_null_size_is_named():
    for raw in ({}, {"hidden_size": None}):
        raw = {name: value for name, value in SIZES.items() if name != "hidden_size"} | raw
        with pytest.raises(ValueError, match='lacks "hidden_size"'):
            LlamaForCausalLM.read_config(raw)


@pytest.mark.parametrize("model_type", [[1, 2], {}, None, 3, "gpt2", "\x1b[31m"])
def test_a_model_type_of_any_kind_is_refused(model_type, tmp_path):
    shutil.copy(FOLDERS[0] / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(SIZES | {"model_type": model_type}))
    with pytest.raises(ValueError, match="supported are llama, mistral, qwen2, qwen3") as error:
        AutoEasyDeLModelForCausalLM.from_pretrained(tmp_path)
    assert "\x1b" not in str(error.value)


@pytest.mark.parametrize("seed", range(60))
def test_random_damage_to_a_config_is_read_or_refused_in_a_short_error(seed, tmp_path):
    rng = random.Random(seed)
    source = rng.choice(FOLDERS)
    shutil.copy(source / "model.safetensors", tmp_path)
    raw = mutated(json.loads((source / "config.json").read_text()), rng)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    try:
        AutoEasyDeLModelForCausalLM.from_pretrained(tmp_path)
    except (ValueError, FileNotFoundError) as error:
        assert len(str(error)) < 700 + len(str(tmp_path))
        assert all(character.isprintable() or character == "\n" for character in str(error))


def made(model_type: str, **changes) -> EasyDeLBaseModule:
    family = FAMILIES[model_type]
    own = {"qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": True}}.get(model_type, {})
    return family.init(tiny_config(**own, **changes), jax.random.key(0))


@pytest.mark.parametrize(
    "model_type, changes",
    [
        ("llama", {}),
        ("llama", {"mlp_bias": True, "qkv_bias": True, "attention_output_bias": True}),
        ("llama", {"rope_scaling": RotaryScaling("llama3", 8.0, 1.0, 4.0, 128), "tie_word_embeddings": False}),
        ("llama", {"rope_scaling": RotaryScaling("linear", 2.0)}),
        ("mistral", {"layer_windows": (16, 16)}),
        ("mistral", {}),
        ("qwen2", {"layer_windows": (None, 16)}),
        ("qwen2", {}),
        ("qwen3", {"layer_windows": (16, None)}),
        ("qwen3", {}),
    ],
)
def test_a_made_model_saves_a_config_that_loads_here_and_in_transformers(model_type, changes, tmp_path):
    model = made(model_type, **changes)
    model.save_pretrained(tmp_path)
    again = AutoEasyDeLModelForCausalLM.from_pretrained(tmp_path)
    assert again.config == model.config
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), model, again))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert theirs.model_type == model_type
    assert theirs.rope_parameters["rope_theta"] == model.config.rope_theta
    assert theirs.num_key_value_heads == model.config.num_key_value_heads
    assert theirs.tie_word_embeddings == model.config.tie_word_embeddings
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [type(model).__name__]


def test_a_changed_config_is_saved_as_it_is_now(tmp_path):
    model = AutoEasyDeLModelForCausalLM.from_pretrained(GOLDEN / "llama")
    changed = dataclasses.replace(model, config=dataclasses.replace(model.config, rope_theta=777.0))
    changed.save_pretrained(tmp_path)
    assert AutoEasyDeLModelForCausalLM.from_pretrained(tmp_path).config.rope_theta == 777.0
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == 2


def test_a_config_that_the_family_cannot_say_is_not_saved_as_another(tmp_path):
    model = LlamaForCausalLM.init(tiny_config(layer_windows=(None, 8)), jax.random.key(0))
    with pytest.raises(ValueError, match=r"cannot say .*layer_windows=\(None, 8\)"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"num_key_value_heads": 3}, "no multiple of num_key_value_heads=3"),
        ({"head_dim": 9}, "head_dim=9 is odd"),
        ({"layer_windows": (None,)}, "layer_windows has 1 entries"),
    ],
)
def test_sizes_that_do_not_fit_one_another_make_no_config(changes, words):
    with pytest.raises(ValueError, match=words):
        tiny_config(**changes)

"""Adapters on disk beside PEFT's own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from easydel import AutoEasyDeLModelForCausalLM, LlamaForCausalLM
from easydel.infra.lora import adapters

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "peft_adapter"
BASE = ROOT / "tests" / "golden" / "families" / "llama"


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(BASE)


@pytest.fixture
def adapter(tmp_path) -> Path:
    """A copy of PEFT's adapter to spoil."""
    return Path(shutil.copytree(GOLDEN, tmp_path / "adapter"))


def change_config(folder: Path, **changes) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_adapter_of_peft_gives_the_logits_of_peft(base):
    golden = np.load(GOLDEN / "golden.npz", allow_pickle=False)
    model = base.load_adapter(GOLDEN)
    assert list(adapters(model)) == [f"layers.{name}_proj" for name in ("self_attn.q", "self_attn.o", "mlp.down")]
    for name, logits in (("adapter", model), ("merged", model.merge_lora())):
        error = np.abs(np.asarray(logits(jnp.array(golden["input_ids"]))) - golden["logits"]).max()
        print(f"{name}: largest logit error beside peft {error:.1e}")
        assert error < 5e-5
    assert model.embed_tokens.weight is base.embed_tokens.weight


def test_saving_writes_the_file_of_peft(base, tmp_path):
    base.load_adapter(GOLDEN).save_adapter(tmp_path, base_model_name_or_path="some/model")
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, GOLDEN))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor)
        assert ours[name].dtype == tensor.dtype
    written, expected = (json.loads((folder / "adapter_config.json").read_text()) for folder in (tmp_path, GOLDEN))
    assert written.pop("base_model_name_or_path") == "some/model"
    assert sorted(written.pop("target_modules")) == sorted(expected["target_modules"])
    assert written == {name: expected[name] for name in written}
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    loaded = base.load_adapter(tmp_path)
    assert loaded.layers.mlp.down_proj.lora.scale == pytest.approx(6 / np.sqrt(4))
    assert loaded.layers.mlp.down_proj.lora.dropout == 0.1


def test_a_model_saved_with_adapters_is_a_plain_model_with_them_merged(base, tmp_path):
    model = base.load_adapter(GOLDEN)
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    ids = jnp.arange(3, 20)[None]
    np.testing.assert_allclose(loaded(ids), model(ids), rtol=1e-5, atol=1e-5)
    assert not loaded.has_lora


def test_an_adapter_folder_loads_the_model_it_names(base, adapter, monkeypatch):
    monkeypatch.chdir(ROOT)
    ids = jnp.arange(3, 20)[None]
    model = AutoEasyDeLModelForCausalLM.from_pretrained(GOLDEN)
    np.testing.assert_array_equal(model(ids), base.load_adapter(GOLDEN)(ids))
    with pytest.raises(ValueError, match="holds an adapter"):
        LlamaForCausalLM.from_pretrained(GOLDEN)
    change_config(adapter, base_model_name_or_path=None)
    with pytest.raises(ValueError, match="no base_model_name_or_path"):
        AutoEasyDeLModelForCausalLM.from_pretrained(adapter)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"use_dora": True}, "use_dora is True, which is not computed here"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern"),
        ({"layers_to_transform": [0]}, "layers_to_transform"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"a_setting_of_the_future": 1}, "a_setting_of_the_future is 1"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the base's weights"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3', expected 'LORA'"),
        ({"target_modules": ["q_proj", "o_proj", "down_proj", "lm_head"]}, "target module lm_head is no linear layer"),
        ({"target_modules": r".*layers\.0\..*q_proj"}, "layers.self_attn.q_proj is adapted in 1 of 2 layers"),
        ({"target_modules": "experts"}, "none matches"),
        ({"r": None}, "r is missing"),
    ],
)
def test_a_setting_that_would_be_ignored_is_refused_by_name(base, adapter, changes, words):
    change_config(adapter, **changes)
    with pytest.raises(ValueError, match=words):
        base.load_adapter(adapter)


def test_targets_may_be_a_regular_expression(base, adapter):
    change_config(adapter, target_modules=r".*(self_attn\.(q|o)|mlp\.down)_proj")
    assert len(adapters(base.load_adapter(adapter))) == 3


def test_every_tensor_that_does_not_fit_is_listed_in_one_error(base, adapter):
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    stem = "base_model.model.model.layers.1"
    del tensors[f"{stem}.self_attn.q_proj.lora_A.weight"]
    tensors[f"{stem}.self_attn.v_proj.lora_A.weight"] = np.zeros((4, 32), np.float32)
    tensors[f"{stem}.mlp.down_proj.lora_B.weight"] = np.zeros((32, 5), np.float32)
    save_file(tensors, path)
    with pytest.raises(ValueError) as error:
        base.load_adapter(adapter)
    for words in (
        "layers.1.self_attn.q_proj.lora_A.weight is missing",
        "layers.1.self_attn.v_proj.lora_A.weight is not part of this adapter",
        r"layers.1.mlp.down_proj.lora_B.weight has shape (32, 5), expected (32, 4)",
    ):
        assert words in str(error.value)


def test_what_is_no_adapter_says_so(base, tmp_path):
    with pytest.raises(FileNotFoundError, match="no adapter_config.json"):
        base.load_adapter(tmp_path)
    with pytest.raises(ValueError, match="has no adapters to save"):
        base.save_adapter(tmp_path)
    with pytest.raises(ValueError, match="has adapters already"):
        base.load_adapter(GOLDEN).load_adapter(GOLDEN)

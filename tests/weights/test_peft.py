"""Adapters on disk beside PEFT's own."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from easydel import AutoEasyDeLModelForCausalLM, LlamaForCausalLM
from easydel.layers.lora import adapters

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


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"r": "4"}, "r is '4', expected a whole number of at least 1"),
        ({"r": True}, "r is True"),
        ({"r": 4.5}, "r is 4.5"),
        ({"r": -4}, "r is -4"),
        ({"r": 0}, "r is 0"),
        ({"r": 2**64}, "has shape (4, 32), expected (18446744073709551616, 32)"),
        ({"lora_alpha": ["x"]}, "lora_alpha is ['x'], expected a number above 0"),
        ({"lora_alpha": float("nan")}, "NaN is no number of JSON"),
        ({"lora_alpha": float("inf")}, "Infinity is no number of JSON"),
        ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
        ({"lora_alpha": -8}, "lora_alpha is -8"),
        ({"lora_dropout": [[]]}, "lora_dropout is [[]], expected a share from 0 to below 1"),
        ({"lora_dropout": float("nan")}, "NaN is no number of JSON"),
        ({"lora_dropout": 1}, "lora_dropout is 1"),
        ({"use_rslora": "no"}, "use_rslora is 'no', expected true or false"),
        ({"target_modules": 1e308}, "target_modules is 1e+308, expected the names of modules or a regular expression"),
        ({"target_modules": []}, "target_modules is []"),
        ({"target_modules": ["q_proj", 3]}, "target_modules is ['q_proj', 3]"),
        ({"target_modules": {"q_proj": 1}}, "target_modules is {'q_proj': 1}"),
        ({"target_modules": "q_proj("}, 'target_modules: "q_proj(" is no regular expression: missing )'),
        ({"rank_pattern": [[]]}, "rank_pattern is [[]], which is not computed here"),
        ({"peft_type": ["LORA"]}, "peft_type is ['LORA'], expected 'LORA'"),
        ({"init_lora_weights": {"a": 1}}, "init_lora_weights is {'a': 1}"),
        ({"a\x1b[2J": 1}, "a\\u001b[2J"),
        ({"loftq_config": "x" * 100_000}, "loftq_config is 'xxx"),
    ],
)
def test_a_setting_of_another_kind_is_refused_in_a_few_words(base, adapter, changes, words):
    change_config(adapter, **changes)
    with pytest.raises(ValueError) as error:
        base.load_adapter(adapter)
    assert words in str(error.value)
    assert len(str(error.value)) < 2500 and "\x1b" not in str(error.value)


@pytest.mark.parametrize(
    "pattern",
    [
        r"(?:a|.|b.|..)+(?=x)",  # every way to cut a name in ones and twos
        r"(?R)",
        r"(?:(?:(?:(?:.?){50}){50}){50}){50}x",  # three hundred million states once written out
        r"(?x)(?:(?:.?){999#}\n}){999}",
        "(" * 5000,
        "a{99999999999999999999}",
    ],
)
def test_a_regular_expression_neither_hangs_nor_fills_the_memory(base, adapter, pattern):
    change_config(adapter, target_modules=pattern)
    start = time.monotonic()
    with pytest.raises(ValueError, match="adapter_config.json: target_modules: "):
        base.load_adapter(adapter)
    assert time.monotonic() - start < 5


def test_regular_expressions_that_people_write_for_peft_choose_what_they_say(base, adapter):
    for pattern in (
        r".*\.(q_proj|o_proj|down_proj)",
        r"^(?!.*(visual|k_proj|v_proj)).*layers\.\d+\..*(?:[qo]|down)_proj$",
        r"(?:.*?(?:self_attn|mlp).*?(?:q_proj|o_proj|down_proj)$)|(?:\bmodel\.layers\.[\d]{1,}\.mlp\.down_proj)",
    ):
        change_config(adapter, target_modules=pattern)
        assert len(adapters(base.load_adapter(adapter))) == 3


@pytest.mark.parametrize(
    "named, words",
    [
        (3, "has base_model_name_or_path 3, expected a folder or a hub id"),
        (["base"], 'has base_model_name_or_path ["base"]'),
        ("a\0b", "has base_model_name_or_path"),
        ("x" * 100_000, "has base_model_name_or_path"),
        ("", "has no base_model_name_or_path"),
        ("ADAPTER", "which is an adapter itself"),
        ("no/such/folder", "neither a folder, a .gguf file nor a hub id"),
    ],
)
def test_a_base_that_is_no_model_is_refused(adapter, named, words):
    # The adapter itself is the shortest of all circles.
    change_config(adapter, base_model_name_or_path=str(adapter) if named == "ADAPTER" else named)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        AutoEasyDeLModelForCausalLM.from_pretrained(adapter)
    assert words in str(error.value) and len(str(error.value)) < 1000


def test_adapters_that_name_each_other_are_refused(adapter, tmp_path):
    other = Path(shutil.copytree(adapter, tmp_path / "other"))
    change_config(adapter, base_model_name_or_path=str(other))
    change_config(other, base_model_name_or_path=str(adapter))
    with pytest.raises(ValueError, match="which is an adapter itself, expected a whole model"):
        AutoEasyDeLModelForCausalLM.from_pretrained(adapter)


def test_an_adapter_for_another_revision_of_its_base_is_loaded_by_hand_only(base, adapter):
    change_config(adapter, base_model_name_or_path=str(BASE), revision="v2")
    with pytest.raises(ValueError, match='was made for revision "v2" of'):
        AutoEasyDeLModelForCausalLM.from_pretrained(adapter)
    assert base.load_adapter(adapter).has_lora


@pytest.mark.parametrize("dtype", [np.float64, np.float16, jnp.bfloat16])
def test_tensors_may_be_of_any_float_dtype(base, adapter, dtype):
    path = adapter / "adapter_model.safetensors"
    exact = {name: tensor.astype(dtype) for name, tensor in load_file(path).items()}
    save_file(exact, path)
    a = base.load_adapter(adapter).layers.mlp.down_proj.lora.a
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"
    np.testing.assert_array_equal(a[1], exact[name].astype(np.float32))


@pytest.mark.parametrize(
    "value, words",
    [
        (np.ones((4, 32), np.int8), "is I8, expected one of F64, F32, F16, BF16"),
        (np.ones((4, 32), bool), "is BOOL"),
        (np.full((4, 32), np.nan, np.float32), "holds numbers that are not finite"),
        (np.full((4, 32), 1e300), "holds numbers that are not finite in float32"),
        (np.float32(1), "has shape (), expected (4, 32)"),
    ],
)
def test_tensors_that_are_no_adapter_are_refused(base, adapter, value, words):
    path = adapter / "adapter_model.safetensors"
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    save_file(load_file(path) | {name: np.asarray(value)}, path)
    with pytest.raises(ValueError) as error:
        base.load_adapter(adapter)
    assert f"{name} {words}" in str(error.value)


def test_damaged_files_are_refused_in_one_line(base, adapter):
    weights, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    intact, text = weights.read_bytes(), config.read_text()
    for damaged in (b"", b"{}", intact[:-1], intact[:50], b"\xff" * 8 + intact[8:], intact[:8] + b"[" + intact[9:]):
        weights.write_bytes(damaged)
        with pytest.raises(ValueError, match="is not a readable safetensors file"):
            base.load_adapter(adapter)
    weights.write_bytes(intact)
    for damaged in (
        b"",
        b"[]",
        b"\xff",
        b"[" * 100_000,
        b'{"r": ' * 50_000,
        b'{"r": ' + b"9" * 5000 + b"}",
        text.encode()[:-3],
    ):
        config.write_bytes(damaged)
        with pytest.raises(ValueError) as error:
            base.load_adapter(adapter)
        assert str(config) in str(error.value) and len(str(error.value)) < 1000


@pytest.mark.parametrize(
    "changes",
    [
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0, "tau": 0.99, "whiten": False}},
        {"layers_pattern": "", "corda_config": None, "arrow_config": None, "ensure_weight_tying": False},
    ],
)
def test_what_peft_says_of_a_start_that_leaves_the_base_as_it_is_refuses_no_adapter(base, adapter, changes):
    change_config(adapter, **changes)
    assert base.load_adapter(adapter).has_lora

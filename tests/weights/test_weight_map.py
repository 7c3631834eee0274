"""Weights run through the map both ways: what is loaded is written by hand, what is saved is what came in."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

from easydel.infra.mesh import create_mesh, parameter_sharding
from easydel.layers.linear import Linear, QuantizedWeight
from easydel.layers.lora import adapters, with_adapters
from easydel.modules.llama import LlamaForCausalLM
from easydel.weights.hugging_face import SafetensorsFolder, write_folder
from easydel.weights.pretrained import load_parameters, tensors_to_save
from easydel.weights.weight_map import TensorRule, WeightMap, fused_linear, linear
from tests.tiny import tiny_config

LAYERS, EXPERTS, INNER, HIDDEN = 4, 3, 8, 16
RNG = np.random.default_rng(0)
EVERY_LAYER = tuple(range(LAYERS))


def random(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


@dataclasses.dataclass
class Case:
    """One kind of correspondence: its rules, the tensors of a folder, and the arrays that they must become."""

    rules: tuple[TensorRule, ...]
    tensors: dict[str, np.ndarray]
    arrays: dict[str, np.ndarray]


def renamed() -> Case:
    weight = random(INNER, HIDDEN)
    return Case(
        (TensorRule("model.norm.weight", ("norm.weight",)),), {"model.norm.weight": weight}, {"norm.weight": weight}
    )


def transposed() -> Case:
    weight = random(HIDDEN, INNER)
    rule = TensorRule("h.{layer}.c_fc.weight", ("up.weight",), layers=(0,), transposed=True)
    return Case((rule,), {"h.0.c_fc.weight": weight}, {"up.weight": weight.T[None]})


def stacked_over_layers() -> Case:
    weights = [random(INNER, HIDDEN) for _ in EVERY_LAYER]
    rules = tuple(rule.under("layers", "model.layers.{layer}", EVERY_LAYER) for rule in linear("mlp.up_proj"))
    tensors = {f"model.layers.{layer}.mlp.up_proj.weight": weight for layer, weight in enumerate(weights)}
    return Case(rules, tensors, {"layers.mlp.up_proj.weight": np.stack(weights)})


def one_layer_by_itself() -> Case:
    weight = random(INNER, HIDDEN)
    rule = TensorRule("up.weight").under("layers.2", "model.layers.{layer}", 2)
    return Case((rule,), {"model.layers.2.up.weight": weight}, {"layers.2.up.weight": weight})


def groups_of_layers() -> Case:
    weights = [random(INNER, HIDDEN) for _ in EVERY_LAYER]
    groups = ((0, 3), (2, 1))
    rules = tuple(
        TensorRule("up.weight").under(f"groups.{number}", "model.layers.{layer}", layers)
        for number, layers in enumerate(groups)
    )
    tensors = {f"model.layers.{layer}.up.weight": weight for layer, weight in enumerate(weights)}
    arrays = {
        f"groups.{number}.up.weight": np.stack([weights[layer] for layer in layers])
        for number, layers in enumerate(groups)
    }
    return Case(rules, tensors, arrays)


def an_expert_a_tensor() -> Case:
    weights = random(LAYERS, EXPERTS, INNER, HIDDEN)
    rule = TensorRule("mlp.experts.{expert}.up_proj.weight", ("mlp.up_proj.weight",))
    tensors = {
        f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight": weights[layer, expert]
        for layer in range(LAYERS)
        for expert in range(EXPERTS)
    }
    rules = (rule.under("layers", "model.layers.{layer}", EVERY_LAYER),)
    return Case(rules, tensors, {"layers.mlp.up_proj.weight": weights})


def fused_rows() -> Case:
    sizes = {"q": 8, "k": 4, "v": 4}
    paths = [f"self_attn.{name}_proj" for name in sizes]
    rules = tuple(
        rule.under("layers", "model.layers.{layer}", EVERY_LAYER) for rule in fused_linear("self_attn.qkv_proj", paths)
    )
    tensors, arrays = {}, {}
    for kind, inner in (("weight", (HIDDEN,)), ("bias", ())):
        parts = {name: random(LAYERS, size, *inner) for name, size in sizes.items()}
        arrays |= {f"layers.self_attn.{name}_proj.{kind}": part for name, part in parts.items()}
        tensors |= {
            f"model.layers.{layer}.self_attn.qkv_proj.{kind}": np.concatenate([part[layer] for part in parts.values()])
            for layer in range(LAYERS)
        }
    return Case(rules, tensors, arrays)


def experts_fused_and_transposed() -> Case:
    fused = random(LAYERS, EXPERTS, HIDDEN, 2 * INNER)
    rule = TensorRule("mlp.experts.gate_up_proj", ("gate.weight", "up.weight"), axis=1, transposed=True)
    tensors = {f"model.layers.{layer}.mlp.experts.gate_up_proj": fused[layer] for layer in range(LAYERS)}
    arrays = {
        "layers.gate.weight": fused[..., :INNER].swapaxes(-1, -2),
        "layers.up.weight": fused[..., INNER:].swapaxes(-1, -2),
    }
    return Case((rule.under("layers", "model.layers.{layer}", EVERY_LAYER),), tensors, arrays)


def experts_interleaved() -> Case:
    fused, bias = random(LAYERS, EXPERTS, HIDDEN, 2 * INNER), random(LAYERS, EXPERTS, 2 * INNER)
    rules = (
        TensorRule("experts.gate_up_proj", ("gate.weight", "up.weight"), axis=1, interleaved=True, transposed=True),
        TensorRule("experts.gate_up_proj_bias", ("gate.bias", "up.bias"), axis=1, interleaved=True),
    )
    tensors = {f"model.layers.{layer}.experts.gate_up_proj": fused[layer] for layer in range(LAYERS)}
    tensors |= {f"model.layers.{layer}.experts.gate_up_proj_bias": bias[layer] for layer in range(LAYERS)}
    arrays = {}
    for first, name in enumerate(("gate", "up")):
        arrays[f"layers.{name}.weight"] = fused[..., first::2].swapaxes(-1, -2)
        arrays[f"layers.{name}.bias"] = bias[..., first::2]
    return Case(tuple(rule.under("layers", "model.layers.{layer}", EVERY_LAYER) for rule in rules), tensors, arrays)


CASES = {
    make.__name__: make()
    for make in (
        renamed,
        transposed,
        stacked_over_layers,
        one_layer_by_itself,
        groups_of_layers,
        an_expert_a_tensor,
        fused_rows,
        experts_fused_and_transposed,
        experts_interleaved,
    )
}
kinds = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def folder_of(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text('{"model_type": "tiny"}')
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, path / "model.safetensors")
    return path


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """A pytree of dictionaries whose arrays have these paths."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def skeleton(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    return nested({path: jax.ShapeDtypeStruct(array.shape, array.dtype) for path, array in arrays.items()})


def load(files: SafetensorsFolder, case: Case, rules=(), dims=(1, -1, 1, 1, 1)) -> dict[str, Any]:
    return load_parameters(
        files, skeleton(case.arrays), WeightMap(case.rules), rules, create_mesh(dims), np.dtype("float32")
    )


def assert_same_arrays(loaded: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    jax.tree.map(np.testing.assert_array_equal, loaded, nested(arrays))


def assert_same_tensors(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    saved = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert saved.keys() == tensors.keys()
    assert {name: tensor.tobytes() for name, tensor in saved.items()} == {
        name: np.ascontiguousarray(tensor).tobytes() for name, tensor in tensors.items()
    }


@kinds
def test_what_is_loaded_is_as_written_by_hand_and_what_is_saved_is_what_came_in(case, tmp_path):
    loaded = load(SafetensorsFolder(folder_of(tmp_path, case.tensors)), case)
    assert_same_arrays(loaded, case.arrays)
    for name, size in (("one", "5GB"), ("shards", "1KB")):
        write_folder(tmp_path / name, {}, tensors_to_save(loaded, WeightMap(case.rules), None), size)
        assert_same_tensors(tmp_path / name, case.tensors)
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists() == (len(case.tensors) > 1)


@kinds
def test_any_slice_of_an_array_is_filled_from_its_own_part_of_the_tensors(case):
    shapes = {path: array.shape for path, array in case.arrays.items()}
    weight_map = WeightMap(case.rules)
    for path, array in case.arrays.items():
        halves = [(slice(None), slice(0, size // 2), slice(size // 2, size)) for size in array.shape]
        for index in itertools.product(*halves):
            expected, read = array[index], []

            def reader(name, part, read=read):
                read.append(case.tensors[name][part])
                return read[-1]

            found = np.full(expected.shape, np.nan, np.float32)
            for piece in weight_map.pieces(path, index, shapes):
                found[piece.target] = piece.read(reader)
            np.testing.assert_array_equal(found, expected)
            # Entries that take turns with another array's are read with them.
            twice = weight_map.rule(path).interleaved
            assert sum(part.size for part in read) <= expected.size * (2 if twice else 1)


class CountedFolder(SafetensorsFolder):
    """A folder that counts the entries it has read."""

    entries = 0

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        part = super().read(name, index)
        self.entries += part.size
        return part


@pytest.mark.devices
@kinds
@pytest.mark.parametrize("rule", [P(None, "fsdp"), P("fsdp", None)], ids=["inputs", "outputs"])
def test_devices_read_their_own_slices_and_nothing_twice(case, rule, tmp_path):
    if len(jax.devices()) < 8:
        pytest.skip("needs eight devices")
    files = CountedFolder(folder_of(tmp_path, case.tensors))
    rules = [(r"weight$", rule), (r"bias$", P("fsdp"))]
    loaded = load(files, case, rules)
    assert_same_arrays(loaded, case.arrays)
    once = sum(tensor.size for tensor in case.tensors.values())
    # An array that eight devices do not divide is whole on each of them, and read once for all.
    assert files.entries <= once * (2 if any(rule.interleaved for rule in case.rules) else 1)
    divided = [leaf for leaf in jax.tree.leaves(loaded) if not leaf.sharding.is_fully_replicated]
    assert all(leaf.addressable_shards[0].data.size * 8 == leaf.size for leaf in divided)


def test_what_does_not_fit_is_named(tmp_path):
    case = CASES["an_expert_a_tensor"]
    name = "model.layers.{}.mlp.experts.{}.up_proj.weight"
    tensors = dict(case.tensors)
    del tensors[name.format(1, 2)]
    tensors |= {name.format(0, EXPERTS): random(2, 2), name.format(3, 0): random(INNER, HIDDEN + 1)}
    with pytest.raises(ValueError) as error:
        load(SafetensorsFolder(folder_of(tmp_path, tensors)), case)
    assert f"tensor {name.format(1, 2)} is missing" in str(error.value)
    assert f"tensor {name.format(0, EXPERTS)} is not part of this model" in str(error.value)
    assert f"tensor {name.format(3, 0)} has shape (8, 17), expected (8, 16)" in str(error.value)


def test_rules_that_contradict_each_other_or_the_arrays_are_refused():
    rule = TensorRule("up.weight", layers=(0, 1))
    with pytest.raises(ValueError, match="up.weight is filled by up.weight and by other"):
        WeightMap((rule, TensorRule("other", ("up.weight",))))
    with pytest.raises(ValueError, match=r"up.weight has shape \(3, 4\), expected 2 layers"):
        WeightMap((rule,)).tensor_shapes({"up.weight": (3, 4)})
    with pytest.raises(KeyError, match="no rule of the weight map fills down.weight"):
        WeightMap((rule,)).tensor_shapes({"down.weight": (3, 4)})
    with pytest.raises(KeyError, match="qk is made of k too"):
        WeightMap((TensorRule("qk", ("q", "k")),)).tensor_shapes({"q": (3, 4)})


def test_the_tensors_of_other_parts_are_left_alone_by_the_map():
    plain = WeightMap((TensorRule("model.norm.weight"), TensorRule("lm_head.weight")))
    wrapped = plain.wrapped({"model.": "model.language_model.", "lm_head.": "lm_head."})
    assert [rule.tensor for rule in wrapped.rules] == ["model.language_model.norm.weight", "lm_head.weight"]
    assert wrapped.is_other("model.visual.norm.weight") and not wrapped.is_other("model.language_model.x")
    assert not plain.is_other("model.visual.norm.weight")
    with pytest.raises(ValueError, match="lm_head.weight begins with none of model"):
        plain.wrapped({"model.": "language_model.model."})


class Wrapped(LlamaForCausalLM):
    """A language model in a folder with other parts."""

    layer_prefix = "language_model.model.layers."

    @classmethod
    def weight_map_for(cls, config):
        plain = LlamaForCausalLM.weight_map_for(config)
        return plain.wrapped({"model.": "language_model.model.", "lm_head.": "language_model.lm_head."})


def test_a_wrapped_folder_keeps_the_tensors_of_its_other_parts(tmp_path, tiny_model):
    tiny_model.save_pretrained(tmp_path / "plain")
    own = {
        f"language_model.{name}": tensor for name, tensor in load_file(tmp_path / "plain" / "model.safetensors").items()
    }
    others = {"vision_tower.patch.weight": random(3, 5, 2, 2), "projector.bias": random(7).astype(np.float16)}
    folder = folder_of(tmp_path / "wrapped", own | others)
    (folder / "config.json").write_bytes((tmp_path / "plain" / "config.json").read_bytes())
    model = Wrapped.from_pretrained(folder)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(model), jax.tree.leaves(tiny_model))
    model.save_pretrained(tmp_path / "saved")
    assert_same_tensors(tmp_path / "saved", own | others)
    model.save_pretrained(folder)  # into the very files that the other parts are read from
    assert_same_tensors(folder, own | others)
    save_file(load_file(tmp_path / "plain" / "model.safetensors") | others, folder / "model.safetensors")
    with pytest.raises(ValueError, match="vision_tower.patch.weight is not part of this model"):
        LlamaForCausalLM.from_pretrained(folder)
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"loaded from .*wrapped, which is gone, and with it the other parts"):
        model.save_pretrained(tmp_path / "again")


class ExpertLayers(eqx.Module):
    """The weights of experts, stacked over layers and experts; nothing here computes with them."""

    gate_proj: Linear
    up_proj: Linear
    router: Linear


USED = 2


class WithExperts(LlamaForCausalLM):
    """A tiny model with experts beside its layers: files, adapters and counts know them by the map alone."""

    experts: ExpertLayers | None = None

    @classmethod
    def weight_map_for(cls, config):
        layers = tuple(range(config.num_hidden_layers))
        rules = (
            TensorRule("gate.weight", ("router.weight",)),
            TensorRule("experts.{expert}.gate_proj.weight", ("gate_proj.weight",)),
            TensorRule("experts.{expert}.w3.weight", ("up_proj.weight",)),
        )
        return WeightMap(
            (
                *LlamaForCausalLM.weight_map_for(config).rules,
                *(rule.under("experts", "model.layers.{layer}.moe", layers) for rule in rules),
            )
        )

    def share_in_use(self, path: str) -> float:
        return USED / EXPERTS if path in ("experts.gate_proj", "experts.up_proj") else 1.0


@pytest.fixture(scope="module")
def with_experts() -> WithExperts:
    plain = LlamaForCausalLM.init(tiny_config(), jax.random.key(0))
    fields = {field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)}
    layers, hidden = plain.config.num_hidden_layers, plain.config.hidden_size
    gate, up = (Linear(jnp.asarray(random(layers, EXPERTS, INNER, hidden)), None) for _ in range(2))
    return WithExperts(
        **fields, experts=ExpertLayers(gate, up, Linear(jnp.asarray(random(layers, EXPERTS, hidden)), None))
    )


def adapted(model: WithExperts, **options) -> WithExperts:
    """Adapters whose second factor is not zero."""
    fresh = adapters(model.apply_lora_to_layers(2, pattern=r"^experts\.", **options))
    new = {
        path: dataclasses.replace(adapter, b=jnp.asarray(random(*adapter.b.shape))) for path, adapter in fresh.items()
    }
    return with_adapters(model, new)


def test_adapters_on_experts_are_applied_and_merged_for_each_of_them(with_experts):
    model = adapted(with_experts, dropout=0.5)
    layers, hidden = model.config.num_hidden_layers, model.config.hidden_size
    lora = model.experts.up_proj.lora
    assert lora.a.shape == (layers, EXPERTS, 2, hidden) and lora.b.shape == (layers, EXPERTS, INNER, 2)
    merged = model.merge_lora().experts.up_proj.weight
    for layer, expert in itertools.product(range(layers), range(EXPERTS)):
        delta = 2 * np.asarray(lora.b)[layer, expert] @ np.asarray(lora.a)[layer, expert]
        expected = np.asarray(with_experts.experts.up_proj.weight)[layer, expert] + delta
        np.testing.assert_allclose(merged[layer, expert], expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"experts.router is 3 x 32"):
        with_experts.apply_lora_to_layers(4, pattern="router")


def test_each_expert_draws_a_dropout_of_its_own(with_experts):
    from easydel.layers.lora import with_dropout

    keys = with_dropout(adapted(with_experts, dropout=0.5), jax.random.key(0)).experts.up_proj.lora.dropout_key
    assert keys.shape == (with_experts.config.num_hidden_layers, EXPERTS)
    assert len(np.unique(jax.random.key_data(keys).reshape(keys.size, -1), axis=0)) == keys.size


def test_adapters_on_experts_have_peft_names_and_come_back(with_experts, tmp_path):
    model = adapted(with_experts)
    model.save_adapter(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.moe.experts.2.w3.lora_B.weight"
    np.testing.assert_array_equal(saved[name], model.experts.up_proj.lora.b[1, 2])
    assert "base_model.model.model.layers.0.moe.gate.lora_A.weight" in saved
    # The layers' own gate_proj ends in the same word and has no adapter: the experts' are named in full.
    targets = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert {"w3", "gate", "model.layers.1.moe.experts.0.gate_proj"} <= set(targets) and "gate_proj" not in targets
    loaded = with_experts.load_adapter(tmp_path)
    assert jax.tree.structure(loaded) == jax.tree.structure(model)
    jax.tree.map(np.testing.assert_array_equal, loaded, model)


def test_experts_are_quantised_expert_by_expert(with_experts, tmp_path):
    model = with_experts.quantize("experts")
    weight = model.experts.gate_proj.weight
    assert isinstance(weight, QuantizedWeight) and weight.scale.shape == weight.values.shape[:-1]
    exact = np.asarray(with_experts.experts.gate_proj.weight)
    step = np.abs(exact).max(axis=-1, keepdims=True) / 127
    assert (np.abs(weight.dequantize() - exact) <= step / 2 * (1 + 1e-4)).all()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(saved["model.layers.1.moe.experts.2.gate_proj.weight"], weight.dequantize()[1, 2])


def test_arithmetic_of_experts_counts_those_in_use(with_experts):
    plain = LlamaForCausalLM.init(with_experts.config, jax.random.key(0))
    layers, hidden = plain.config.num_hidden_layers, plain.config.hidden_size
    in_use = layers * hidden * (2 * USED * INNER + EXPERTS)
    assert with_experts.flops_per_token == plain.flops_per_token + 2 * in_use
    factors = 2 * layers * (2 * USED * (INNER + hidden) + (EXPERTS + hidden))
    model = adapted(with_experts)
    assert model.flops_per_token == with_experts.flops_per_token + 2 * factors
    assert model.training_flops_per_token == 2 * model.flops_per_token + 2 * factors


@pytest.mark.parametrize("stack", [(), (4,), (4, 3)], ids=["one layer", "layers", "layers and experts"])
def test_one_rule_table_lays_out_weights_however_they_are_stacked(stack):
    mesh = create_mesh((1, 1, 1, 1, 1), jax.devices()[:1])
    none = (None,) * len(stack)
    expected = {
        ("q_proj.weight", (8, 4)): ("tp", "fsdp"),
        ("q_proj.weight.values", (8, 4)): ("tp", "fsdp"),
        ("q_proj.weight.scale", (8,)): ("tp",),
        ("q_proj.bias", (8,)): ("tp",),
        ("q_proj.lora.a", (2, 4)): (None, "fsdp"),
        ("q_proj.lora.b", (8, 2)): ("tp", None),
        ("down_proj.weight", (8, 4)): ("fsdp", "tp"),
        ("down_proj.weight.scale", (8,)): ("fsdp",),
        ("down_proj.lora.a", (2, 4)): (None, "tp"),
        ("down_proj.lora.b", (8, 2)): ("fsdp", None),
    }
    for (path, shape), spec in expected.items():
        rules = LlamaForCausalLM.partition_rules
        assert parameter_sharding(f"layers.{path}", stack + shape, rules, mesh).spec == P(*none, *spec), path


class Fused(LlamaForCausalLM):
    """A tiny model whose files hold queries, keys and values as one module."""

    @classmethod
    def weight_map_for(cls, config):
        layers = tuple(range(config.num_hidden_layers))
        fused = fused_linear("self_attn.qkv_proj", [f"self_attn.{name}_proj" for name in "qkv"])
        others = [
            rule
            for rule in LlamaForCausalLM.weight_map_for(config).rules
            if not any(f".{n}_proj." in rule.tensor for n in "qkv")
        ]
        return WeightMap((*others, *(rule.under("layers", "model.layers.{layer}", layers) for rule in fused)))


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}], ids=["lora", "rslora"])
def test_adapters_on_a_fused_module_are_saved_as_one_and_add_the_same(options, tmp_path):
    plain = Fused.init(tiny_config(), jax.random.key(0))
    fresh = adapters(plain.apply_lora_to_layers(2, 6, pattern="q_proj|v_proj|down_proj", **options))
    model = with_adapters(
        plain, {path: dataclasses.replace(one, b=jnp.asarray(random(*one.b.shape))) for path, one in fresh.items()}
    )
    model.save_adapter(tmp_path / "first")
    config = json.loads((tmp_path / "first" / "adapter_config.json").read_text())
    assert config["r"] == 4 and set(config["target_modules"]) == {"qkv_proj", "down_proj"}
    loaded = plain.load_adapter(tmp_path / "first")
    new = adapters(loaded)
    for path, adapter in adapters(model).items():
        np.testing.assert_allclose(new[path].delta, adapter.delta, rtol=1e-5, atol=1e-5)
    assert not np.any(new["layers.self_attn.k_proj"].delta)
    loaded.save_adapter(tmp_path / "second")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "second" / file).read_bytes() == (tmp_path / "first" / file).read_bytes()

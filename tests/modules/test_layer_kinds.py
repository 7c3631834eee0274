"""A family whose layers have two shapes, and give sums for a loss beside the main one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easydel import AutoEasyDeLModelForCausalLM, LlamaForCausalLM
from easydel.infra.base_config import EasyDeLBaseConfig, decoder_config, read_decoder_keys
from easydel.infra.config_keys import whole
from easydel.layers.layer_stacks import scan_stacks
from easydel.layers.mlp import GatedMLP
from easydel.modules import FAMILIES
from easydel.modules.decoder import DecoderForCausalLM
from easydel.ops.attention.inputs import TokenIds
from tests.tiny import tiny_config

WIDE = 40
SIZES = {"narrow": 16, "wide": WIDE}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoShapesConfig(EasyDeLBaseConfig):
    wide_layer_step: int

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        return tuple("narrow" if (i + 1) % self.wide_layer_step else "wide" for i in range(self.num_hidden_layers))


class CountingMLP(GatedMLP):
    """A gated MLP that counts the tokens it sees, and sums its squared outputs."""

    def __call__(self, x, is_token):
        out, _ = super().__call__(x, is_token)
        squares = jnp.sum(jnp.square(out) * is_token[:, None])
        return out, {"tokens": jnp.sum(is_token), "squares": squares}


class TwoShapesForCausalLM(DecoderForCausalLM):
    """Llama with a wider MLP in every so many layers."""

    model_type = "two_shapes"

    @classmethod
    def read_config(cls, raw: Mapping[str, Any]) -> TwoShapesConfig:
        values = read_decoder_keys(raw, {"wide_layer_step": whole(1, 1000)})
        return decoder_config(TwoShapesConfig, raw, values, wide_layer_step=values["wide_layer_step"])

    @classmethod
    def family_keys(cls, config: TwoShapesConfig) -> dict[str, Any]:
        return {"wide_layer_step": config.wide_layer_step}

    @classmethod
    def init_layer(cls, key, config, kind):
        layer = super().init_layer(key, config, kind)
        mlp = CountingMLP.init(key, config.hidden_size, SIZES[kind], config.initializer_range)
        return dataclasses.replace(layer, mlp=mlp)


def made(layers: int, step: int) -> TwoShapesForCausalLM:
    values = {field.name: getattr(tiny_config(), field.name) for field in dataclasses.fields(EasyDeLBaseConfig)}
    values |= {"num_hidden_layers": layers, "layer_windows": (None,) * layers, "intermediate_size": WIDE}
    return TwoShapesForCausalLM.init(TwoShapesConfig(**values, wide_layer_step=step), jax.random.key(0))


def of_one_shape(model: TwoShapesForCausalLM) -> LlamaForCausalLM:
    """The same function as a Llama: narrow layers are wide ones whose further features are zero."""

    def padded(mlp, missing):
        def pad(linear, axis):
            widths = [(0, missing if number == axis else 0) for number in range(3)]
            return dataclasses.replace(linear, weight=jnp.pad(linear.weight, widths))

        return GatedMLP(pad(mlp.gate_proj, 1), pad(mlp.up_proj, 1), pad(mlp.down_proj, 2))

    stacks = {
        kind: dataclasses.replace(stack, mlp=padded(stack.mlp, WIDE - SIZES[kind]))
        for kind, stack in model.layers.items()
    }
    used = dict.fromkeys(stacks, 0)
    layers = []
    for kind in model.config.layer_kinds:
        layers.append(jax.tree.map(lambda leaf, number=used[kind]: leaf[number], stacks[kind]))
        used[kind] += 1
    config = tiny_config(num_hidden_layers=len(layers), layer_windows=(None,) * len(layers), intermediate_size=WIDE)
    return LlamaForCausalLM(
        config=config,
        dtype=model.dtype,
        embed_tokens=model.embed_tokens,
        layers=jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers),
        norm=model.norm,
        lm_head=None,
    )


@pytest.mark.parametrize("layers, step", [(6, 3), (4, 2), (5, 3)], ids=["pattern", "alternating", "no pattern"])
def test_layers_of_two_shapes_run_in_their_order(layers, step):
    model = made(layers, step)
    plain = of_one_shape(model)
    tokens = jnp.array(np.random.default_rng(0).integers(1, 64, (2, 10)))
    ids = TokenIds.of_sequences(jnp.array([[*range(10)], [*range(7), -1, -1, -1]]))

    def run(model):
        output = model.hidden_states(tokens, ids, remat=True)
        return jnp.sum(jnp.sin(output.hidden) * (ids.segment > 0)[..., None]), output

    (_, output), gradient = jax.jit(jax.value_and_grad(run, has_aux=True))(model)
    (_, expected), of_plain = jax.jit(jax.value_and_grad(run, has_aux=True))(plain)
    np.testing.assert_allclose(output.hidden, expected.hidden, atol=2e-5)
    np.testing.assert_allclose(gradient.embed_tokens.weight, of_plain.embed_tokens.weight, atol=2e-4)
    assert expected.auxiliary == {}
    assert int(output.auxiliary["tokens"]) == layers * 17
    assert float(output.auxiliary["squares"]) > 0


def test_generation_files_and_adapters_follow_both_shapes(tmp_path, monkeypatch):
    monkeypatch.setitem(FAMILIES, "two_shapes", TwoShapesForCausalLM)
    model = made(4, 2)
    prompts = [[5, 9, 2, 7], [3, 1]]
    assert model.generate(prompts, max_new_tokens=6) == of_one_shape(model).generate(prompts, max_new_tokens=6)
    model.save_pretrained(tmp_path)
    again = AutoEasyDeLModelForCausalLM.from_pretrained(tmp_path)
    assert again.config == model.config
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), model, again))
    adapted = again.apply_lora_to_layers(2, pattern=r"wide\.mlp")
    assert adapted.layers["narrow"].mlp.up_proj.lora is None
    assert adapted.layers["wide"].mlp.up_proj.lora.a.shape == (2, 2, 32)


@pytest.mark.parametrize("order", ["ab", "aab" * 3, "abb" * 2 + "a", "aabba", "bbb"])
def test_stacks_are_run_as_a_loop_would(order):
    def body(factor):
        return lambda carry, x: (carry * factor + x, carry - x)

    bodies = {"a": body(2.0), "b": body(-3.0)}
    stacks = {kind: jnp.arange(1.0, 1 + order.count(kind)) for kind in set(order)}
    carry, outputs = scan_stacks(bodies, jnp.float32(1.0), stacks, order)
    expected, used, of_kind = 1.0, {"a": 0, "b": 0}, {kind: [] for kind in stacks}
    for kind in order:
        expected, out = bodies[kind](expected, float(stacks[kind][used[kind]]))
        used[kind] += 1
        of_kind[kind].append(out)
    assert float(carry) == expected
    assert {kind: out.tolist() for kind, out in outputs.items()} == of_kind

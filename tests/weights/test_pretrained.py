"""Number types: which a model may have, and which are trained in."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easydel import LlamaForCausalLM
from easydel.trainers.adapted_model import adapted_model
from easydel.trainers.training_arguments import TrainingArguments
from easydel.weights.pretrained import float_dtype

LLAMA = Path(__file__).parents[1] / "golden" / "families" / "llama"


@pytest.mark.parametrize("value", ["float32", jnp.float32, np.float32, np.dtype("float32"), "bfloat16", jnp.float16])
def test_a_type_may_be_given_by_name_or_as_itself(value):
    assert float_dtype("dtype", value) == jnp.dtype(value)


@pytest.mark.parametrize(
    "value",
    [
        *("auto", "fp16", "float", "float64", float, np.float64, "int8", int, bool, "bool", "float8_e4m3fn"),
        *("complex64", None, "", 3, [], object(), "x\x1b" * 999),
    ],
)
@pytest.mark.parametrize("option", ["dtype", "param_dtype"])
def test_other_types_are_refused_at_once(value, option):
    if (option, value) == ("dtype", None):
        return  # the device's own
    with pytest.raises(ValueError) as error:
        LlamaForCausalLM.from_pretrained(LLAMA, **{option: value})
    assert str(error.value).startswith(f"{option}=") and "expected one of float32, bfloat16, float16" in str(
        error.value
    )
    assert len(str(error.value)) < 250 and "\x1b" not in str(error.value)


def test_a_model_is_not_saved_in_whole_numbers(tiny_model, tmp_path):
    with pytest.raises(ValueError, match='dtype="int8", expected one of float32'):
        tiny_model.save_pretrained(tmp_path, dtype="int8")


def test_float64_is_there_where_jax_has_it():
    with pytest.raises(ValueError, match="float64 needs jax_enable_x64"):
        float_dtype("dtype", "float64")
    with jax.enable_x64(True):
        assert float_dtype("dtype", "float64") == np.float64


def test_float16_computes_but_is_not_trained_in():
    half, single = (LlamaForCausalLM.from_pretrained(LLAMA, dtype=dtype) for dtype in ("float16", "float32"))
    ids = jnp.arange(3, 20)[None]
    np.testing.assert_allclose(half(ids), single(ids), atol=0.02)
    with pytest.raises(ValueError, match="computes in float16, which is not trained in: load it with dtype=bfloat16"):
        adapted_model(half, TrainingArguments())
    kept = LlamaForCausalLM.from_pretrained(LLAMA, param_dtype="float16")
    with pytest.raises(ValueError, match="keeps parameters in float16, which are not trained: load it with param_"):
        adapted_model(kept, TrainingArguments())


def test_adapters_are_trained_beside_weights_of_any_type():
    kept = LlamaForCausalLM.from_pretrained(LLAMA, param_dtype="float16")
    assert adapted_model(kept, TrainingArguments(lora_rank=2)).has_lora

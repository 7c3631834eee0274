"""Every family's logits, cached generation and saved files against `transformers` on tiny random models."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from easydel import AutoEasyDeLModelForCausalLM, Qwen3ForCausalLM

GOLDEN = Path(__file__).parents[1] / "golden" / "families"
FAMILIES = sorted(path.name for path in GOLDEN.iterdir())


@pytest.fixture(params=FAMILIES)
def folder(request) -> Path:
    return GOLDEN / request.param


def load_golden(folder: Path) -> dict[str, np.ndarray]:
    return dict(np.load(folder / "golden.npz", allow_pickle=False))


def test_logits_equal_transformers(folder):
    golden = load_golden(folder)
    logits = AutoEasyDeLModelForCausalLM.from_pretrained(folder)(jnp.array(golden["input_ids"]))
    error = np.abs(np.asarray(logits) - golden["logits"]).max()
    print(f"{folder.name}: largest logit error {error:.1e}")
    assert error < 5e-5


def test_logits_of_the_real_smollm2_equal_transformers(smollm2):
    golden = np.load(GOLDEN.parent / "smollm2_logits.npz", allow_pickle=False)
    logits = np.asarray(smollm2[0](jnp.array(golden["input_ids"])[None])[0])
    found = logits[-1], logits[:, :: int(golden["vocabulary_step"])]
    expected = golden["last_logits"], golden["some_logits"]
    errors = [np.abs(ours - truth).max() for ours, truth in zip(found, expected)]
    print(f"SmolLM2-135M-Instruct: largest logit error {max(errors):.1e}")
    for ours, truth in zip(found, expected):  # logits go up to 41, where float32 itself is 4e-6 coarse
        np.testing.assert_allclose(ours, truth, rtol=1e-6, atol=1e-4)


def test_greedy_generation_with_a_cache_equals_transformers(folder):
    golden = load_golden(folder)
    prompts = golden["input_ids"][:, :16].tolist()
    model = AutoEasyDeLModelForCausalLM.from_pretrained(folder)
    assert model.generate(prompts, max_new_tokens=8) == golden["generated"].tolist()
    # Prompts of different lengths share a batch without disturbing one another.
    together = model.generate([prompts[0], prompts[1][:5]], max_new_tokens=4)
    assert together == [
        model.generate([prompts[0]], max_new_tokens=4)[0],
        model.generate([prompts[1][:5]], max_new_tokens=4)[0],
    ]


def test_saving_and_loading_changes_nothing(folder, tmp_path):
    model = AutoEasyDeLModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    again = AutoEasyDeLModelForCausalLM.from_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), model, again))
    kept = json.loads((folder / "config.json").read_text())
    assert json.loads((tmp_path / "config.json").read_text()) == kept


def test_old_and_new_spelling_of_the_rotary_settings_agree(tmp_path):
    source = GOLDEN / "llama3_rope"
    config = json.loads((source / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for file in source.glob("*.safetensors*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    golden = load_golden(source)
    logits = AutoEasyDeLModelForCausalLM.from_pretrained(tmp_path)(jnp.array(golden["input_ids"]))
    np.testing.assert_allclose(logits, golden["logits"], atol=5e-5)


def test_bfloat16_compute_keeps_float32_parameters():
    model = AutoEasyDeLModelForCausalLM.from_pretrained(GOLDEN / "qwen3", dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype("float32")}
    golden = load_golden(GOLDEN / "qwen3")
    logits = np.asarray(model(jnp.array(golden["input_ids"])))
    assert 0 < np.abs(logits - golden["logits"]).mean() < 0.1


def damaged(tmp_path: Path, **changes) -> Path:
    """A copy of the tiny Qwen3 with tensors replaced (an array) or removed (None)."""
    (tmp_path / "config.json").write_bytes((GOLDEN / "qwen3" / "config.json").read_bytes())
    tensors = load_file(GOLDEN / "qwen3" / "model.safetensors")
    for name, value in changes.items():
        tensors[name] = value
    save_file({name: value for name, value in tensors.items() if value is not None}, tmp_path / "model.safetensors")
    return tmp_path


def test_missing_surplus_and_misshaped_tensors_are_listed_in_one_error(tmp_path):
    changes = {
        "model.norm.weight": None,
        "model.layers.0.self_attn.extra.weight": np.zeros(3, np.float32),
        "model.layers.1.self_attn.q_norm.weight": np.zeros(5, np.float32),
    }
    with pytest.raises(ValueError) as error:
        AutoEasyDeLModelForCausalLM.from_pretrained(damaged(tmp_path, **changes))
    message = str(error.value)
    assert "model.norm.weight is missing" in message
    assert "model.layers.0.self_attn.extra.weight is not part of this model" in message
    assert "model.layers.1.self_attn.q_norm.weight has shape (5,), expected (16,)" in message


def test_a_tied_copy_of_the_head_is_no_surplus(tmp_path):
    embedding = load_file(GOLDEN / "qwen3" / "model.safetensors")["model.embed_tokens.weight"]
    model = AutoEasyDeLModelForCausalLM.from_pretrained(damaged(tmp_path, **{"lm_head.weight": embedding}))
    assert model.lm_head is None


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model_type": "gpt2"}, 'model_type "gpt2"; supported are llama'),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, 'rope_type "yarn"'),
        ({"hidden_act": "gelu"}, '"hidden_act": "gelu"'),
        ({"hidden_size": None}, 'lacks "hidden_size"'),
    ],
)
def test_a_config_that_would_be_computed_wrongly_is_refused(tmp_path, change, words):
    config = json.loads((GOLDEN / "qwen3" / "config.json").read_text()) | change
    folder = damaged(tmp_path)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=words):
        AutoEasyDeLModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("name", ["no/such/folder/at-all", "./missing", "missing-folder"])
def test_a_path_that_is_not_there_says_so(name):
    with pytest.raises(FileNotFoundError, match="neither a folder"):
        AutoEasyDeLModelForCausalLM.from_pretrained(name)


def test_the_wrong_class_names_the_right_way():
    with pytest.raises(ValueError, match="AutoEasyDeLModelForCausalLM"):
        Qwen3ForCausalLM.from_pretrained(GOLDEN / "llama")


def test_top_p_keeps_only_the_likeliest_tokens():
    model = AutoEasyDeLModelForCausalLM.from_pretrained(GOLDEN / "llama")
    prompt = load_golden(GOLDEN / "llama")["input_ids"][0, :16].tolist()
    greedy = model.generate([prompt], max_new_tokens=4)
    assert model.generate([prompt], max_new_tokens=4, temperature=1.0, top_p=1e-6, key=jax.random.key(1)) == greedy
    samples = {
        tuple(model.generate([prompt], max_new_tokens=4, temperature=2.0, key=jax.random.key(s))[0]) for s in range(4)
    }
    assert len(samples) > 1
    stop = greedy[0][1]
    expected = greedy[0][: greedy[0].index(stop)]
    assert model.generate([prompt], max_new_tokens=4, stop_token_ids=[stop]) == [expected]
    with pytest.raises(ValueError, match="key"):
        model.generate([prompt], temperature=1.0)
    for wrong in ([-1], [model.config.vocab_size]):
        with pytest.raises(ValueError, match=f"token id {wrong[0]}"):
            model.generate([prompt, wrong])
    with pytest.raises(ValueError, match="temperature=nan"):
        model.generate([prompt], temperature=float("nan"))

"""A model folder is read as transformers reads it, or refused; what goes out is what came in."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from easydel import AutoEasyDeLModelForCausalLM
from easydel.weights.pretrained import local_path

GOLDEN = Path(__file__).parents[1] / "golden" / "families"
UNTIED, TIED = GOLDEN / "mistral", GOLDEN / "qwen3"
HEAD, EMBEDDING, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    return {name: array for file in folder.glob("*.safetensors") for name, array in load_file(file).items()}


def make_folder(folder: Path, source: Path, tensors: Mapping[str, np.ndarray] | None = None, **changes) -> Path:
    """A copy of a tiny model with other tensors, keys changed in its config, null removing one."""
    folder.mkdir(exist_ok=True)
    config = json.loads((source / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    save_file(dict(tensors or tensors_of(source)), folder / "model.safetensors")
    return folder


def shard(folder: Path, tensors: Mapping[str, np.ndarray], parts: int = 2, **places: str) -> dict[str, str]:
    """Write tensors in shards with an index; `places` overrides where the index says a tensor is."""
    names, weight_map = sorted(tensors), {}
    for part in range(parts):
        file = f"model-{part + 1:05}-of-{parts:05}.safetensors"
        held = names[part::parts]
        save_file({name: tensors[name] for name in held}, folder / file)
        weight_map |= dict.fromkeys(held, file)
    write_index(folder, weight_map | places)
    return weight_map


def write_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def load(folder: Path):
    return AutoEasyDeLModelForCausalLM.from_pretrained(folder)


def refusal(folder: Path, kind: type[Exception] = ValueError) -> str:
    with pytest.raises(kind) as error:
        load(folder)
    message = str(error.value)
    assert len(message) < 700 + 2 * len(str(folder))
    assert all(character.isprintable() or character == "\n" for character in message)
    return message


def same(left, right) -> bool:
    return jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), left, right))


def test_one_file_wins_over_old_shards_and_says_so(tmp_path, caplog):
    folder = make_folder(tmp_path, UNTIED)
    shard(folder, {name: array + 1 for name, array in tensors_of(UNTIED).items()})
    assert same(load(folder), load(UNTIED))
    assert "holds both model.safetensors and model.safetensors.index.json" in caplog.text


def test_an_index_of_the_one_file_is_no_second_set_of_weights(tmp_path, caplog):
    folder = make_folder(tmp_path, UNTIED)
    write_index(folder, dict.fromkeys(tensors_of(UNTIED), "model.safetensors"))
    assert same(load(folder), load(UNTIED))
    assert caplog.text == ""


def test_other_files_beside_the_weights_are_not_read(tmp_path):
    folder = make_folder(tmp_path, UNTIED)
    other = {name: array + 1 for name, array in tensors_of(UNTIED).items()}
    for name in ("consolidated.safetensors", "adapter_model.safetensors", "model.fp16.safetensors", "onnx/model"):
        (folder / name).parent.mkdir(exist_ok=True)
        save_file(other, folder / name)
    for name in ("model.safetensors.index.fp16.json", "pytorch_model.bin.index.json", "adapter_config.json"):
        (folder / name).write_text('{"weight_map": 3}')
    assert same(load(folder), load(UNTIED))


def test_shards_are_read_by_their_index(tmp_path):
    folder = make_folder(tmp_path, UNTIED)
    (folder / "model.safetensors").unlink()
    shard(folder, tensors_of(UNTIED), parts=3)
    assert same(load(folder), load(UNTIED))


def sharded(folder: Path, **places: str) -> Path:
    make_folder(folder, UNTIED)
    (folder / "model.safetensors").unlink()
    shard(folder, tensors_of(UNTIED), **places)
    return folder


@pytest.mark.parametrize(
    "weight_map",
    [True, None, [], {}, {NORM: 0}, {NORM: ["model.safetensors"]}, {NORM: None}, {NORM: ""}, {NORM: "config.json"}],
    ids=str,
)
def test_an_index_of_another_kind_is_refused(weight_map, tmp_path):
    folder = sharded(tmp_path)
    write_index(folder, weight_map)
    assert "model.safetensors.index.json" in refusal(folder)
    (folder / "model.safetensors.index.json").write_text('{"metadata": {}}')
    assert '"weight_map": null' in refusal(folder)


@pytest.mark.parametrize("kind", ["..", "absolute", "subfolder", "link", "zero byte"])
def test_an_index_does_not_lead_out_of_the_folder(kind, tmp_path):
    outside, folder = tmp_path / "outside.safetensors", sharded(tmp_path / "model")
    save_file({NORM: tensors_of(UNTIED)[NORM]}, outside)
    (folder / "inner").mkdir()
    shutil.copy(outside, folder / "inner")
    (folder / "linked.safetensors").symlink_to(outside)
    name = {
        "..": "../outside.safetensors",
        "absolute": str(outside),
        "subfolder": "inner/outside.safetensors",
        "link": "linked.safetensors",
        "zero byte": "model\0.safetensors",
    }[kind]
    shard(folder, tensors_of(UNTIED), **{NORM: name})
    assert "no plain name of a .safetensors file inside the folder" in refusal(folder)


def test_the_links_of_the_hub_cache_are_followed(tmp_path):
    folder = sharded(tmp_path / "made")
    blobs, snapshot = tmp_path / "cache" / "blobs", tmp_path / "cache" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(folder.iterdir()):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(os.path.relpath(blobs / str(number), snapshot))
    assert same(load(snapshot), load(UNTIED))


def test_what_index_and_shards_disagree_about_is_listed_in_one_error(tmp_path):
    folder = sharded(tmp_path)
    weight_map = shard(folder, tensors_of(UNTIED))
    shutil.copy(folder / weight_map[NORM], folder / "model-00003-of-00002.safetensors")
    del weight_map[NORM]
    write_index(folder, weight_map | {"model.layers.9.x.weight": "model-00001-of-00002.safetensors"})
    message = refusal(folder)
    assert f"tensor {NORM} is in model-0000" in message
    assert "tensor model.layers.9.x.weight is not in model-00001-of-00002.safetensors" in message
    assert "model-00003-of-00002.safetensors is a shard of the same set" in message


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    folder = sharded(tmp_path)
    weight_map = shard(folder, tensors_of(UNTIED))
    other = next(file for file in weight_map.values() if file != weight_map[NORM])
    save_file(load_file(folder / other) | {NORM: tensors_of(UNTIED)[NORM]}, folder / other)
    assert f"tensor {NORM} is in model-00001-of-00002.safetensors and in model-00002" in refusal(folder)


def test_a_missing_shard_is_named(tmp_path):
    folder = sharded(tmp_path)
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors" in refusal(folder, FileNotFoundError)


@pytest.mark.parametrize(
    "content",
    [
        b"[1]",
        b'"text"',
        b"",
        b"\xff\xfe{\x00}\x00",
        '{"model_type": "llama"}'.encode("utf-16"),
        b"[" * 100_000,
        b'{"a": ' * 100_000,
        b'{"rms_norm_eps": NaN}',
        b'{"rope_theta": Infinity}',
        b'{"model_type": "mistral", "model_type": "llama"}',
        b'{"vocab_size": 1' + b"0" * 5000 + b"}",
        b'{"vocab_size": 96',
    ],
    ids=lambda content: repr(content[:20]),
)
@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
def test_text_that_is_no_json_object_names_the_file(content, file, tmp_path):
    folder = sharded(tmp_path)
    (folder / file).write_bytes(content)
    assert str(folder / file) in refusal(folder)


def test_a_folder_or_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(tmp_path):
    for name in ("config.json", "model.safetensors"):
        folder = make_folder(tmp_path / name, UNTIED)
        (folder / name).unlink()
        os.mkfifo(folder / name)
        assert "no plain file" in refusal(folder, (ValueError, FileNotFoundError))
        (folder / name).unlink()
        (folder / name).mkdir()
        assert "no plain file" in refusal(folder, (ValueError, FileNotFoundError))


def lying(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 7,
        (2**63).to_bytes(8, "little") + b"{}",
        lying(b"[" * 1000),
        lying({NORM: {"dtype": "F32", "shape": [32], "data_offsets": [0, 128]}}),
        lying({NORM: {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 128]}}, b"\0" * 128),
        lying({NORM: {"dtype": "F32", "shape": [-1], "data_offsets": [0, 128]}}, b"\0" * 128),
        lying({NORM: {"dtype": "F32", "shape": [32], "data_offsets": [128, 0]}}, b"\0" * 128),
        lying({"a\x1b[31m": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}),
        lying({}),
    ],
    ids=range(10),
)
def test_a_safetensors_header_that_lies_is_refused(content, tmp_path):
    folder = make_folder(tmp_path, UNTIED)
    (folder / "model.safetensors").write_bytes(content)
    refusal(folder)


def changed(source: Path, name: str, change) -> dict[str, np.ndarray]:
    tensors = tensors_of(source)
    return tensors | {name: change(tensors[name])}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [NORM, "model.layers.1.mlp.up_proj.weight"])
def test_a_weight_that_is_no_number_is_named(value, name, tmp_path):
    def spoil(array):
        array = array.copy()
        array[3] = value
        return array

    message = refusal(make_folder(tmp_path, UNTIED, changed(UNTIED, name, spoil)))
    assert f"tensor {name} holds NaN or infinity as float32" in message


def test_large_weights_that_only_their_sum_overflows_are_numbers(tmp_path):
    folder = make_folder(tmp_path, UNTIED, changed(UNTIED, NORM, lambda array: np.full_like(array, 3e38)))
    assert float(load(folder).norm.weight[0]) == np.float32(3e38)


@pytest.mark.parametrize("dtype", [np.int32, np.int8, np.uint8, np.bool_])
def test_weights_of_whole_numbers_are_refused(dtype, tmp_path):
    message = refusal(make_folder(tmp_path, UNTIED, changed(UNTIED, NORM, lambda array: array.astype(dtype))))
    assert f"tensor {NORM} is" in message and "no floating-point numbers" in message


def test_an_empty_tensor_is_misshaped(tmp_path):
    message = refusal(make_folder(tmp_path, UNTIED, changed(UNTIED, NORM, lambda array: array[:0])))
    assert f"tensor {NORM} has shape (0,), expected (32,)" in message


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
def test_fp8_weights_are_told_by_their_type(dtype, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    message = refusal(make_folder(tmp_path, UNTIED, changed(UNTIED, name, lambda array: array.astype(dtype))))
    assert "quantised weights (fp8)" in message and "Load the model it was made from" in message


@pytest.mark.parametrize(
    "suffix, dtype, method",
    [
        ("qweight", np.int32, "GPTQ or AWQ"),
        ("weight_packed", np.int32, "compressed-tensors"),
        ("weight_scale_inv", np.float32, "fp8"),
        ("weight.absmax", np.float32, "bitsandbytes"),
        ("SCB", np.float32, "bitsandbytes"),
    ],
)
def test_quantised_weights_are_told_by_their_names(suffix, dtype, method, tmp_path):
    tensors = tensors_of(UNTIED) | {f"model.layers.0.mlp.up_proj.{suffix}": np.zeros(4, dtype)}
    message = refusal(make_folder(tmp_path, UNTIED, tensors))
    assert f"quantised weights ({method})" in message and "quantize_base" in message


@pytest.mark.parametrize(
    "change, method",
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, '"gptq"'),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, '"bitsandbytes"'),
        ({"quantization_config": {"quant_method": "fp8"}}, '"fp8"'),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, '"compressed-tensors"'),
        ({"quantization": {"group_size": 64, "bits": 4}}, '"quantization": {"group_size": 64'),
        ({"quantization_config": "awq"}, '"awq"'),
    ],
)
def test_quantised_weights_are_told_by_the_config(change, method, tmp_path):
    message = refusal(make_folder(tmp_path, UNTIED, **change))
    assert method in message and "Load the model it was made from" in message


def test_a_tied_model_with_a_head_of_its_own_is_refused(tmp_path):
    embedding = tensors_of(TIED)[EMBEDDING]
    for head in (embedding + 1, embedding[:-1]):
        message = refusal(make_folder(tmp_path, TIED, tensors_of(TIED) | {HEAD: head}))
        assert '"tie_word_embeddings": true' in message and HEAD in message and EMBEDDING in message


def test_an_untied_model_without_a_head_is_told_what_ties(tmp_path):
    tensors = {name: array for name, array in tensors_of(UNTIED).items() if name != HEAD}
    message = refusal(make_folder(tmp_path, UNTIED, tensors))
    assert f"tensor {HEAD} is missing" in message and '"tie_word_embeddings"' in message


@pytest.mark.parametrize("layers", [1, 3, 2**31, 2**64, 10**30])
def test_the_number_of_layers_is_compared_with_the_files_first(layers, tmp_path):
    message = refusal(make_folder(tmp_path, UNTIED, num_hidden_layers=layers))
    assert f'"num_hidden_layers": {layers}' in message and "the weights hold 2 layers" in message


def test_files_that_go_with_the_weights_are_kept_as_they_are(tmp_path):
    source, out = make_folder(tmp_path / "source", UNTIED), tmp_path / "out"
    kept = {
        "generation_config.json": '{"eos_token_id": [2, 0],\r\n "temperature": 0.6}',
        "LICENSE": "Terms — of use\n",
        "USE_POLICY.md": "Policy",
    }
    for name, text in kept.items():
        (source / name).write_bytes(text.encode())
    for name in ("README.md", "modeling_x.py", "consolidated.safetensors", "notes.txt"):
        (source / name).write_text("not kept")
    load(source).save_pretrained(out)
    assert {name: (out / name).read_bytes().decode() for name in kept} == kept
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors", *kept}
    load(out).save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "LICENSE").read_text() == kept["LICENSE"]


def test_kept_files_make_no_other_model(tmp_path):
    folder = make_folder(tmp_path, UNTIED)
    plain = load(folder)
    (folder / "generation_config.json").write_text("{}")
    assert jax.tree.structure(load(folder)) == jax.tree.structure(plain)


def test_a_kept_file_that_is_damaged_or_a_link_out_of_the_folder_is_reported(tmp_path, caplog):
    folder = make_folder(tmp_path / "model", UNTIED)
    (tmp_path / "secret").write_text("key")
    (folder / "LICENSE").symlink_to(tmp_path / "secret")
    (folder / "generation_config.json").write_text("{")
    (folder / "NOTICE").write_bytes(b"\xff\xff")
    assert load(folder).config.kept_files == ()
    for name in ("LICENSE", "generation_config.json", "NOTICE"):
        assert f"{name} is not kept" in caplog.text


@pytest.mark.parametrize(
    "name", ["", "\0", "a" * 5000, "org/ma\x1bme", "org/näme", "~nobody-there/x", "org/model/file", "../x/y", "org/-x"]
)
def test_an_odd_name_is_no_model(name):
    with pytest.raises(FileNotFoundError) as error:
        local_path(name)
    assert len(str(error.value)) < 300 and str(error.value).isprintable()


def test_a_hub_id_without_a_connection_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="is no local folder, and the hub did not give it") as error:
        local_path("nobody-at-all/no-such-model")
    assert "\n" not in str(error.value)


def test_a_path_in_the_home_folder_means_the_same_when_saving_as_when_loading(tmp_path, monkeypatch):
    from easydel.paths import user_path
    from easydel.weights.hugging_face import write_folder

    monkeypatch.setenv("HOME", str(tmp_path))
    write_folder("~/model", {"model_type": "llama"}, {})
    assert (tmp_path / "model" / "config.json").is_file()
    with pytest.raises(FileNotFoundError, match="~nobody-here/model is in a home folder that is not known"):
        user_path("~nobody-here/model")

"""A GGUF file reads like the Hugging Face folder it was made from."""

import dataclasses
import os
import struct
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from easydel.infra.download import DownloadError, smollm2_135m_instruct
from easydel.weights.gguf.checkpoint import GGUFCheckpoint, unpermute_rotary
from easydel.weights.gguf.header import read_header
from easydel.weights.gguf.tokenizer import tokenizer_from_gguf

gguf = pytest.importorskip("gguf")
quants = pytest.importorskip("gguf.quants")

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, VOCABULARY = 32, 64, 4, 2, 48
HEAD_DIM = HIDDEN // HEADS
GGUF_MUTATIONS = int(os.environ.get("EASYDEL_GGUF_MUTATIONS", "300"))
Q8_0 = gguf.GGMLQuantizationType.Q8_0


def layer_tensors(rng: np.random.Generator, biases: bool) -> dict[str, np.ndarray]:
    shapes: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (HIDDEN,),
        "attn_q.weight": (HEADS * HEAD_DIM, HIDDEN),
        "attn_k.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
        "attn_v.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
        "attn_output.weight": (HIDDEN, HEADS * HEAD_DIM),
        "ffn_norm.weight": (HIDDEN,),
        "ffn_gate.weight": (INTERMEDIATE, HIDDEN),
        "ffn_up.weight": (INTERMEDIATE, HIDDEN),
        "ffn_down.weight": (HIDDEN, INTERMEDIATE),
    }
    if biases:
        shapes |= {f"attn_{name}.bias": (shapes[f"attn_{name}.weight"][0],) for name in "qkv"}
    return {f"blk.0.{name}": rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    ends = {"token_embd.weight": (VOCABULARY, HIDDEN), "output_norm.weight": (HIDDEN,)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in ends.items()} | layer_tensors(rng, False)


def write(
    path: Path,
    tensors: dict[str, np.ndarray],
    architecture: str = "llama",
    quantized: tuple[str, ...] = (),
    extend: Callable[[Any], None] = lambda writer: None,
) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    extend(writer)
    for name, values in tensors.items():
        if name in quantized:
            writer.add_tensor(name, quants.quantize(values, Q8_0), raw_dtype=Q8_0)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# Tensors


def test_names_and_shapes_are_those_of_the_hugging_face_model(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    checkpoint = GGUFCheckpoint(write(tmp_path / "m.gguf", tensors))
    layer = "model.layers.0"
    assert {name: checkpoint.shape(name) for name in checkpoint.tensor_names} == {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        f"{layer}.input_layernorm.weight": (HIDDEN,),
        f"{layer}.self_attn.q_proj.weight": (32, HIDDEN),
        f"{layer}.self_attn.k_proj.weight": (16, HIDDEN),
        f"{layer}.self_attn.v_proj.weight": (16, HIDDEN),
        f"{layer}.self_attn.o_proj.weight": (HIDDEN, 32),
        f"{layer}.post_attention_layernorm.weight": (HIDDEN,),
        f"{layer}.mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
        f"{layer}.mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
        f"{layer}.mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
    }


def test_float32_tensors_come_back_as_written(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    checkpoint = GGUFCheckpoint(write(tmp_path / "m.gguf", tensors))
    values = checkpoint.read("model.layers.0.mlp.down_proj.weight")
    assert values.dtype == np.float32
    assert_array_equal(values, tensors["blk.0.ffn_down.weight"])


def test_half_precision_tensors_come_back_as_float32(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    tensors["blk.0.ffn_down.weight"] = tensors["blk.0.ffn_down.weight"].astype(np.float16)
    values = GGUFCheckpoint(write(tmp_path / "m.gguf", tensors)).read("model.layers.0.mlp.down_proj.weight")
    assert values.dtype == np.float32
    assert_array_equal(values, tensors["blk.0.ffn_down.weight"].astype(np.float32))


def test_q8_0_is_off_by_half_a_step_at_most(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    written = tensors["blk.0.ffn_up.weight"]
    checkpoint = GGUFCheckpoint(write(tmp_path / "m.gguf", tensors, quantized=("blk.0.ffn_up.weight",)))
    values = checkpoint.read("model.layers.0.mlp.up_proj.weight")
    # Rows are one block of 32: its largest value is 127 steps. The step itself is rounded to float16.
    step = np.abs(written).max(axis=1, keepdims=True) / 127
    assert values.shape == written.shape
    assert np.all(np.abs(values - written) <= step * (0.5 + 127 * 2**-11))
    assert np.any(values != written)


@pytest.mark.parametrize("quantized", [(), ("blk.0.attn_q.weight",)])
def test_a_part_is_cut_after_the_whole_is_put_in_order(
    tmp_path: Path, tensors: dict[str, np.ndarray], quantized: tuple[str, ...]
) -> None:
    checkpoint = GGUFCheckpoint(write(tmp_path / "m.gguf", tensors, quantized=quantized))
    name = "model.layers.0.self_attn.q_proj.weight"
    index = (slice(3, 9), slice(16, None))
    part = checkpoint.read(name, index)
    checkpoint.read("model.norm.weight")
    assert_array_equal(part, checkpoint.read(name)[index])


def test_values_cannot_be_changed_behind_the_next_reader(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    checkpoint = GGUFCheckpoint(write(tmp_path / "m.gguf", tensors))
    for name in checkpoint.tensor_names:
        with pytest.raises(ValueError, match="read-only"):
            checkpoint.read(name)[...] = 0


def test_an_absent_tensor_is_named(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    with pytest.raises(KeyError, match=r"no tensor lm_head\.weight"):
        GGUFCheckpoint(write(tmp_path / "m.gguf", tensors)).read("lm_head.weight")


# Rotary order


def test_rows_of_a_llama_head_go_from_neighbours_to_halves(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    # In the file rows (0, 1), (2, 3) … share an angle; in a Hugging Face head of 8, rows (0, 4), (1, 5) …
    head = [0, 2, 4, 6, 1, 3, 5, 7]
    order = [HEAD_DIM * h + row for h in range(HEADS) for row in head]
    tensors |= layer_tensors(np.random.default_rng(1), biases=True)
    checkpoint = GGUFCheckpoint(write(tmp_path / "m.gguf", tensors))
    for name, rows in (("q", order), ("k", order[: KV_HEADS * HEAD_DIM])):
        for part in ("weight", "bias"):
            values = checkpoint.read(f"model.layers.0.self_attn.{name}_proj.{part}")
            assert_array_equal(values, tensors[f"blk.0.attn_{name}.{part}"][rows])
    assert_array_equal(checkpoint.read("model.layers.0.self_attn.v_proj.bias"), tensors["blk.0.attn_v.bias"])


def test_both_rotary_orders_give_the_same_attention_scores() -> None:
    q, k = np.random.default_rng(2).normal(size=(2, HEADS * HEAD_DIM))
    angles = 3.0 * 0.1 ** np.arange(HEAD_DIM // 2)

    def scores(q_1: np.ndarray, q_2: np.ndarray, k_1: np.ndarray, k_2: np.ndarray) -> np.ndarray:
        cos, sin = np.cos(angles), np.sin(angles)
        return ((q_1 * cos - q_2 * sin) * k_1 + (q_1 * sin + q_2 * cos) * k_2).sum(-1)

    neighbours = [rows.reshape(HEADS, -1, 2)[..., side] for rows in (q, k) for side in (0, 1)]
    halves = [unpermute_rotary(rows, HEADS).reshape(HEADS, 2, -1)[:, side] for rows in (q, k) for side in (0, 1)]
    assert_allclose(scores(*halves), scores(*neighbours), rtol=1e-12)


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_qwen_rows_stay_and_biases_and_head_norms_are_named(
    tmp_path: Path, tensors: dict[str, np.ndarray], architecture: str
) -> None:
    tensors |= layer_tensors(np.random.default_rng(1), biases=architecture == "qwen2")
    if architecture == "qwen3":
        tensors |= {f"blk.0.attn_{name}_norm.weight": np.arange(8, dtype=np.float32) for name in "qk"}
    checkpoint = GGUFCheckpoint(write(tmp_path / "m.gguf", tensors, architecture))
    layer = "model.layers.0.self_attn"
    assert checkpoint.config["model_type"] == architecture
    assert checkpoint.config["attention_bias"] == (architecture == "qwen2")
    assert_array_equal(checkpoint.read(f"{layer}.q_proj.weight"), tensors["blk.0.attn_q.weight"])
    if architecture == "qwen2":
        assert_array_equal(checkpoint.read(f"{layer}.k_proj.bias"), tensors["blk.0.attn_k.bias"])
    else:
        assert_array_equal(checkpoint.read(f"{layer}.k_norm.weight"), np.arange(8))


# Config


def test_the_config_is_the_one_of_a_hugging_face_folder(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    def ids(writer: Any) -> None:
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)

    assert GGUFCheckpoint(write(tmp_path / "m.gguf", tensors, extend=ids)).config == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": None,
        "max_position_embeddings": 64,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }


def test_an_output_tensor_unties_the_embeddings(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    tensors["output.weight"] = tensors["token_embd.weight"] + 1
    checkpoint = GGUFCheckpoint(write(tmp_path / "m.gguf", tensors))
    assert checkpoint.config["tie_word_embeddings"] is False
    assert_array_equal(checkpoint.read("lm_head.weight"), tensors["output.weight"])


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_written_rope_scaling_reaches_the_config(tmp_path: Path, tensors: dict[str, np.ndarray], kind: str) -> None:
    def scaling(writer: Any) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(16)

    expected = {"rope_type": kind, "factor": 4.0}
    if kind == "yarn":
        expected["original_max_position_embeddings"] = 16
    assert GGUFCheckpoint(write(tmp_path / "m.gguf", tensors, extend=scaling)).config["rope_scaling"] == expected


def llama3_factors() -> np.ndarray:
    """Divisors of the four frequencies of a head of 8, theta 500 000, by the rule of Llama 3.1 with factor 32."""
    divisors = []
    for frequency in 500000.0 ** -np.array([0, 1 / 4, 1 / 2, 3 / 4]):
        wavelength = 2 * np.pi / frequency
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192 / 1:
            divisors.append(32.0)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            divisors.append(1 / ((1 - smooth) / 32 + smooth))
    return np.array(divisors, np.float32)


def test_rope_factors_of_llama3_become_its_config(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    factors = llama3_factors()
    assert 1 < factors[2] < 32  # one of each kind: kept, blended, stretched
    checkpoint = GGUFCheckpoint(write(tmp_path / "m.gguf", tensors | {"rope_freqs.weight": factors}))
    assert "rope_freqs.weight" not in checkpoint.tensor_names
    assert checkpoint.config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def test_rope_factors_that_no_config_can_say_are_refused(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    factors = llama3_factors() * np.array([1, 1, 1.1, 1], np.float32)
    with pytest.raises(ValueError, match=r"rope_freqs\.weight are not those of a llama3"):
        GGUFCheckpoint(write(tmp_path / "m.gguf", tensors | {"rope_freqs.weight": factors}))


# What is refused


def test_an_unknown_architecture_is_named_beside_the_known(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    with pytest.raises(ValueError, match="'mamba', expected one of llama, qwen2, qwen3"):
        GGUFCheckpoint(write(tmp_path / "m.gguf", tensors, "mamba"))


def test_surplus_tensors_are_named(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    tensors["blk.0.ffn_gate_shexp.weight"] = np.zeros((4, 32), np.float32)
    with pytest.raises(ValueError, match=r"1 tensors have no place .* blk\.0\.ffn_gate_shexp\.weight"):
        GGUFCheckpoint(write(tmp_path / "m.gguf", tensors))


@pytest.mark.parametrize(
    ("extend", "message"),
    [
        (lambda writer: writer.add_expert_count(8), "mixture of 8 experts"),
        (lambda writer: writer.add_rope_dimension_count(4), "rope.dimension_count=4, expected the head size 8"),
        (lambda writer: writer.add_uint16("split.count", 3), "part 1 of 3"),
        (lambda writer: writer.add_string("llama.rope.scaling.type", "longrope"), "'longrope', expected none, linear"),
    ],
)
def test_models_that_would_be_read_wrongly_are_refused(
    tmp_path: Path, tensors: dict[str, np.ndarray], extend: Callable[[Any], None], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        GGUFCheckpoint(write(tmp_path / "m.gguf", tensors, extend=extend))


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"PK\x03\x04 not a model")
    with pytest.raises(ValueError, match="not a GGUF file"):
        GGUFCheckpoint(path)
    with pytest.raises(FileNotFoundError, match="is not a file"):
        GGUFCheckpoint(tmp_path)


def test_a_big_endian_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "big") + bytes(16))
    with pytest.raises(ValueError, match="big-endian"):
        GGUFCheckpoint(path)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    whole = write(tmp_path / "m.gguf", tensors).read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in [*range(4, 2000, 7), len(whole) // 2, len(whole) - 33]:
        cut.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="truncated"):
            GGUFCheckpoint(cut)


def test_a_missing_package_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r'pip install "easydel-dpo\[gguf\]"'):
        GGUFCheckpoint(tmp_path / "m.gguf")


# Tokenizer

SPECIAL = ["<|im_start|>", "<|im_end|>"]


def byte_letters() -> dict[int, str]:
    """The letter by which byte-level BPE writes each byte: itself if it prints, else the next free above 255."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


def write_tokenizer(path: Path, pre: str = "smollm", model: str = "gpt2", **flags: bool) -> Path:
    merges = ["h e", "l l", "he ll", "hell o", "Ġ hello", "Ġ 1", "1 2", "12 3"]
    tokens = [*SPECIAL, *byte_letters().values(), *(merge.replace(" ", "") for merge in merges), "whole"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}")
    for flag, value in flags.items():
        writer.add_bool(f"tokenizer.ggml.{flag}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "default", "qwen2", "llama-bpe", "llama3"])
def test_text_survives_the_round_trip(tmp_path: Path, pre: str) -> None:
    tokenizer = tokenizer_from_gguf(write_tokenizer(tmp_path / "t.gguf", pre, add_bos_token=False))
    for text in ("hello hello", " 123  12\n\n\tdon't", "naïve 日本 🙂", "<|im_start|>hello<|im_end|>\n"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("smollm", ["hello", "1", "2", "3", "1", "Ġ", "1", "2"]),
        ("gpt-2", ["hello", "123", "1", "Ġ1", "2"]),
        ("qwen2", ["hello", "1", "2", "3", "1", "Ġ", "1", "2"]),
        ("llama-bpe", ["hello", "123", "1", "Ġ", "12"]),
    ],
)
def test_digits_are_split_as_the_pre_tokeniser_says(tmp_path: Path, pre: str, pieces: list[str]) -> None:
    tokenizer = tokenizer_from_gguf(write_tokenizer(tmp_path / "t.gguf", pre, add_bos_token=False))
    assert tokenizer.tokenize("hello1231 12") == pieces


def test_a_special_token_is_one_id_and_can_be_left_out(tmp_path: Path) -> None:
    tokenizer = tokenizer_from_gguf(write_tokenizer(tmp_path / "t.gguf"))
    ids = tokenizer("<|im_start|>hello<|im_end|>")["input_ids"]
    assert ids[0] == 0 and ids[-1] == 1 and len(ids) == 3
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (*SPECIAL, None)


def test_the_chat_template_comes_along(tmp_path: Path) -> None:
    tokenizer = tokenizer_from_gguf(write_tokenizer(tmp_path / "t.gguf"))
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert rendered == "<|im_start|>hello<|im_end|>"


def test_a_saved_tokenizer_gives_the_same_ids(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = tokenizer_from_gguf(write_tokenizer(tmp_path / "t.gguf", add_bos_token=True))
    tokenizer.save_pretrained(tmp_path / "folder")
    again = AutoTokenizer.from_pretrained(tmp_path / "folder")
    text = "<|im_start|>hello 12<|im_end|> hello"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.chat_template == tokenizer.chat_template


def test_bos_and_eos_are_added_where_the_file_asks(tmp_path: Path) -> None:
    def ids(pre: str, **flags: bool) -> list[int]:
        return tokenizer_from_gguf(write_tokenizer(tmp_path / "t.gguf", pre, **flags))("hello")["input_ids"]

    (hello,) = ids("smollm")
    assert ids("smollm", add_bos_token=True) == [0, hello]
    assert ids("smollm", add_bos_token=True, add_eos_token=True) == [0, hello, 1]
    assert ids("llama-bpe") == [0, hello]  # Llama 3 files do not say it
    assert ids("llama-bpe", add_bos_token=False) == [hello]


@pytest.mark.parametrize(("pre", "pieces"), [("llama-bpe", ["whole"]), ("gpt-2", list("whole"))])
def test_a_piece_that_is_a_token_needs_no_merges_in_llama3_alone(tmp_path: Path, pre: str, pieces: list[str]) -> None:
    tokenizer = tokenizer_from_gguf(write_tokenizer(tmp_path / "t.gguf", pre, add_bos_token=False))
    assert tokenizer.tokenize("whole") == pieces


def test_a_merge_of_no_tokens_is_shown(tmp_path: Path) -> None:
    path = write_tokenizer(tmp_path / "t.gguf")
    path.write_bytes(path.read_bytes().replace(b"he ll", b"he lx"))
    with pytest.raises(ValueError, match=r"merges\[2\] is 'he lx', expected two tokens"):
        tokenizer_from_gguf(path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pre": "tekken"}, "'tekken', expected one of default, gpt-2, smollm, qwen2, llama-bpe, llama3"),
        ({"model": "llama"}, "'llama', expected 'gpt2'"),
    ],
)
def test_other_tokenizers_are_refused_by_name(tmp_path: Path, settings: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenizer_from_gguf(write_tokenizer(tmp_path / "t.gguf", **settings))


# Damage


def set_value(path: Path, key: str, value: Any) -> Path:
    """A tiny model with one more value, of whatever type numpy gives it."""

    def extend(writer: Any) -> None:
        writer.kv_data[0].pop(key, None)
        kinds = {bool: "bool", int: "int64", float: "float32", str: "string", list: "array"}
        getattr(writer, f"add_{kinds[type(value)]}")(key, value)

    rng = np.random.default_rng(0)
    ends = {"token_embd.weight": (VOCABULARY, HIDDEN), "output_norm.weight": (HIDDEN,)}
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in ends.items()}
    return write(path, tensors | layer_tensors(rng, False), extend=extend)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("llama.block_count", 2**31 - 1, "llama.block_count=2147483647, but the file has 11 tensors"),
        ("llama.block_count", 2**62, "llama.block_count=4611686018427387904, expected a positive whole number"),
        ("llama.block_count", "1", 'llama.block_count="1", expected a positive whole number'),
        ("llama.block_count", [1], "llama.block_count=[1]"),
        ("llama.embedding_length", -32, "llama.embedding_length=-32"),
        ("llama.attention.head_count", 0, "attention.head_count=0"),
        ("llama.attention.head_count", ["x"], "llama.attention.head_count="),
        ("llama.attention.head_count", 2**30, "make no attention"),
        ("llama.attention.head_count_kv", 3, "4 heads of 8 values and 3 key heads make no attention"),
        ("llama.feed_forward_length", [1.5], "llama.feed_forward_length=[1.5]"),
        ("llama.attention.layer_norm_rms_epsilon", -1.0, "rms_epsilon=-1.0, expected a finite number above 0"),
        ("llama.attention.layer_norm_rms_epsilon", float("nan"), "expected a finite number above 0"),
        ("llama.rope.freq_base", True, "llama.rope.freq_base=true"),
        ("llama.rope.scaling.type", 3, "llama.rope.scaling.type=3, expected text"),
        ("llama.expert_count", "many", "llama.expert_count="),
        ("general.architecture", 7, "general.architecture is 7, expected one of"),
        ("general.architecture", "x\x1b" * 9999, "expected one of llama"),
        ("general.alignment", 0, "general.alignment=0, expected a positive integer"),
        ("general.alignment", 2**62, "expected a positive integer of at most"),
        ("general.alignment", "32", 'general.alignment="32"'),
        ("split.count", "3", 'split.count="3"'),
        ("tokenizer.ggml.eos_token_id", -1, "tokenizer.ggml.eos_token_id=-1"),
        ("tokenizer.ggml.bos_token_id", [1], "tokenizer.ggml.bos_token_id=[1]"),
    ],
)
def test_a_value_of_another_kind_is_refused_by_its_key(tmp_path: Path, key: str, value: Any, words: str) -> None:
    with pytest.raises(ValueError) as error:
        GGUFCheckpoint(set_value(tmp_path / "m.gguf", key, value))
    assert words in str(error.value)
    assert len(str(error.value)) < 500 and "\x1b" not in str(error.value)


def header(*parts: tuple[str, Any]) -> bytes:
    return b"GGUF" + b"".join(struct.pack("<" + code, value) for code, value in parts)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (header(("I", 3), ("Q", 0), ("Q", 2**60)), "twice"),
        (header(("I", 3), ("Q", 2**60), ("Q", 0)), "has 0 dimensions"),
        (header(("I", 3), ("Q", 0), ("Q", 1), ("Q", 2**64 - 1)), "truncated"),
        (header(("I", 3), ("Q", 0), ("Q", 1), ("Q", 0), ("I", 9), ("I", 8), ("Q", 2**60)), "expected at most"),
        (header(("I", 3), ("Q", 0), ("Q", 1), ("Q", 0), ("I", 9), ("I", 8), ("Q", 2**24)), "truncated"),
        (header(("I", 3), ("Q", 0), ("Q", 1), ("Q", 0), ("I", 9), ("I", 0), ("Q", 2**60)), "expected at most"),
        (header(("I", 3), ("Q", 0), ("Q", 1), ("Q", 0)) + struct.pack("<IIQ", 9, 9, 1) * 5000, "holds lists"),
        (header(("I", 3), ("Q", 0), ("Q", 2)) + struct.pack("<QIB", 0, 0, 1) * 2, "has  twice"),
        (header(("I", 3), ("Q", 1), ("Q", 0), ("Q", 0), ("I", 2), ("Q", 2**63), ("Q", 0)), "without values"),
    ],
)
def test_counts_and_lengths_that_cannot_be_are_refused_before_anything_is_built(
    tmp_path: Path, data: bytes, words: str
) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(data + bytes(64))
    tracemalloc.start()
    for read in (GGUFCheckpoint, tokenizer_from_gguf):
        with pytest.raises(ValueError, match=words):
            read(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 22
    tracemalloc.stop()


def test_tensors_that_overlap_are_refused(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    path = write(tmp_path / "m.gguf", tensors)
    data = path.read_bytes()
    place = data.index(b"output_norm.weight") + len("output_norm.weight") + 4 + 8 + 4
    path.write_bytes(data[:place] + struct.pack("<Q", 32) + data[place + 8 :])
    with pytest.raises(ValueError, match=r"tensors token_embd\.weight and output_norm\.weight overlap"):
        GGUFCheckpoint(path)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("tokenizer.ggml.tokens", [1, 2], "tokenizer.ggml.tokens="),
        ("tokenizer.ggml.token_type", ["a"], "tokenizer.ggml.token_type="),
        ("tokenizer.ggml.token_type", [3], "expected the same number of each"),
        ("tokenizer.ggml.merges", "h e", "tokenizer.ggml.merges="),
        ("tokenizer.ggml.merges", ["h"], "merges[0] is 'h', expected two tokens"),
        ("tokenizer.ggml.eos_token_id", "1", "tokenizer.ggml.eos_token_id="),
        ("tokenizer.ggml.eos_token_id", 2**20, "expected less than"),
        ("tokenizer.ggml.add_bos_token", "yes", "expected true or false"),
        ("tokenizer.chat_template", 3, "tokenizer.chat_template=3, expected text"),
        ("tokenizer.ggml.pre", ["smollm"], "tokenizer.ggml.pre is ['smollm'], expected one of"),
        ("tokenizer.ggml.model", 1, "tokenizer.ggml.model is 1, expected"),
        ("llama.context_length", -5, "llama.context_length=-5"),
    ],
)
def test_a_tokenizer_of_another_kind_is_refused_by_its_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: Any, words: str
) -> None:
    read = read_header(write_tokenizer(tmp_path / "t.gguf"))
    changed = dataclasses.replace(read, metadata=read.metadata | {key: value})
    monkeypatch.setattr("easydel.weights.gguf.tokenizer.read_header", lambda path: changed)
    with pytest.raises(ValueError) as error:
        tokenizer_from_gguf(tmp_path / "t.gguf")
    assert words in str(error.value) and len(str(error.value)) < 500


def damage(data: bytes, rng: np.random.Generator) -> bytes:
    """One change of the kind that disks and strangers make."""
    spoilt, at = bytearray(data), int(rng.integers(len(data)))
    match int(rng.integers(4)):
        case 0:
            spoilt[at] ^= 1 << int(rng.integers(8))
        case 1:
            spoilt[at : at + 8] = struct.pack("<Q", (0, 1, 2**31, 2**60, 2**64 - 1)[int(rng.integers(5))])
        case 2:
            spoilt = spoilt[:at]
        case 3:
            other = int(rng.integers(len(data)))
            spoilt[at : at + 16] = spoilt[other : other + 16]
    return bytes(spoilt)


def test_a_damaged_file_is_read_or_refused_shortly(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    rng = np.random.default_rng(0)
    model = write(tmp_path / "m.gguf", tensors).read_bytes()
    tokenizer = write_tokenizer(tmp_path / "t.gguf").read_bytes()
    small = model[: len(model) - sum(values.nbytes for values in tensors.values())]
    path = tmp_path / "spoilt.gguf"
    outcomes = {"read": 0, "refused": 0}
    for index in range(GGUF_MUTATIONS):
        which, read = ((tokenizer, tokenizer_from_gguf), (model, GGUFCheckpoint))[index % 2]
        spoilt = damage(which if which is tokenizer else small, rng)
        path.write_bytes(spoilt if which is tokenizer else spoilt + model[len(small) :])
        try:
            read(path)
            outcomes["read"] += 1
        except ValueError as error:
            assert len(str(error)) < 600
            outcomes["refused"] += 1
    assert outcomes["refused"] > GGUF_MUTATIONS / 5, outcomes


@pytest.mark.slow
def test_the_real_model_reads_whole() -> None:
    try:
        path = smollm2_135m_instruct()
    except DownloadError as error:
        pytest.skip(str(error))
    checkpoint = GGUFCheckpoint(path)
    assert checkpoint.config["rope_theta"] == 100000.0
    assert len(checkpoint.tensor_names) == 272
    assert sum(checkpoint.read(name).size for name in checkpoint.tensor_names) == 134_515_008
    assert all(np.isfinite(checkpoint.read(name)).all() for name in checkpoint.tensor_names)

    tokenizer = tokenizer_from_gguf(path)
    ids = tokenizer("<|im_start|>user\nIn 2024, don't<|im_end|>\n")["input_ids"]
    assert tokenizer.decode(ids) == "<|im_start|>user\nIn 2024, don't<|im_end|>\n"
    assert (ids[0], ids[-2]) == (1, 2)
    assert tokenizer.tokenize("2024") == list("2024")

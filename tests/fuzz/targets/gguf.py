"""GGUF files: damaged bytes, and headers whose values are of other types and sizes than a model's."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from easydel import AutoEasyDeLModelForCausalLM, load_tokenizer
from easydel.data import PreferenceTransform
from tests.fuzz.inputs import SEEDS, damaged, mutate_bytes
from tests.fuzz.made import CHATML, PLAIN, ROWS, SPECIAL

LAYERS, HIDDEN, HEADS, MLP = 1, 16, 2, 16
TOKENS = [*SPECIAL, *PLAIN.replace(" ", "Ġ").replace("\n", "Ċ"), "th", "in"]
METADATA: dict[str, Any] = {
    "llama.block_count": LAYERS,
    "llama.context_length": 64,
    "llama.embedding_length": HIDDEN,
    "llama.feed_forward_length": MLP,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": HEADS,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 10000.0,
    "llama.vocab_size": len(TOKENS),
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (len(PLAIN) + 2),
    "tokenizer.ggml.merges": ["t h", "i n"],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 4,
    "tokenizer.ggml.padding_token_id": 0,
    "tokenizer.ggml.add_bos_token": False,
    "tokenizer.chat_template": CHATML,
}
OTHER_VALUES: list[Any] = [
    0,
    -1,
    1,
    2**31,
    2**63 - 1,
    0.0,
    -1.0,
    float("nan"),
    1e38,
    True,
    "",
    "x",
    "\x1b[2J",
    [0],
    ["a"],
    [0.5],
]
OTHER_VALUES += [[1] * 300, ["a"] * 300, [2**31 - 1], [-1], "gpt2", "llama", "{{ 1 / 0 }}"]
EXTRA = ["llama.rope.scaling.type", "llama.rope.scaling.factor", "llama.expert_count", "llama.attention.key_length"]
EXTRA += ["llama.attention.value_length", "llama.rope.dimension_count", "split.count", "general.alignment"]
EXTRA += ["tokenizer.ggml.scores", "general.architecture"]


def _write(path: Path, metadata: dict[str, Any], tensors: dict[str, np.ndarray]) -> bytes:
    from gguf import GGUFWriter
    from gguf.constants import GGUFValueType

    writer = GGUFWriter(str(path), "llama")
    for name, value in metadata.items():
        first = value[0] if isinstance(value, list) else value
        kinds = {
            bool: GGUFValueType.BOOL,
            int: GGUFValueType.INT64,
            float: GGUFValueType.FLOAT32,
            str: GGUFValueType.STRING,
        }
        kind = kinds[type(first)]
        if isinstance(first, int) and not isinstance(first, bool) and 0 <= first < 2**31:
            kind = GGUFValueType.UINT32
        with contextlib.suppress(ValueError):  # the architecture is there already
            writer.add_array(name, value) if isinstance(value, list) else writer.add_key_value(name, value, kind)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def _tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (len(TOKENS), HIDDEN), "output_norm.weight": (HIDDEN,)}
    layer = dict.fromkeys(
        ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"), (HIDDEN, HIDDEN)
    )
    layer |= {"attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,)}
    shapes |= {f"blk.{number}.{name}.weight": shape for number in range(LAYERS) for name, shape in layer.items()}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def _files(work: Path) -> st.SearchStrategy[bytes]:
    good = _write(work / "good.gguf", METADATA, _tensors())
    header = len(good) - sum(tensor.nbytes for tensor in _tensors().values())

    def bent(seed: int) -> bytes:
        rng = random.Random(seed)
        metadata, tensors = dict(METADATA), _tensors()
        for _ in range(rng.choice((1, 1, 2))):
            name = rng.choice([*METADATA, *EXTRA])
            if rng.random() < 0.2:
                metadata.pop(name, None)
            else:
                metadata[name] = rng.choice(OTHER_VALUES)
        if rng.random() < 0.3:
            name = rng.choice(list(tensors))
            tensor = tensors.pop(name)
            if rng.random() < 0.7:
                tensors[rng.choice([name, "blk.7.attn_q.weight", "x"])] = rng.choice(
                    [tensor.T.copy(), tensor[:1], tensor]
                )
        return _write(work / "bent.gguf", metadata, tensors)

    def in_header(seed: int) -> bytes:
        return mutate_bytes(good[:header], seed) + good[header:]

    key = b"tokenizer.ggml.merges\x09\0\0\0"  # an array: of arrays of arrays of …
    nest = good[:header].replace(key + b"\x08\0\0\0", key + (b"\x09\0\0\0" + b"\x01" + b"\0" * 7) * 5000)
    return st.one_of(*(st.builds(make, SEEDS) for make in (bent, in_header, in_header)), damaged(good), st.just(nest))


def tokenizers(work: Path) -> Any:
    """The header and the tokenizer."""
    path = work / "model.gguf"

    def run(content: bytes) -> Any:
        path.write_bytes(content)
        return PreferenceTransform(load_tokenizer(path))(ROWS[2])

    return _files(work), run, True


def models(work: Path) -> Any:
    """The header, the config and the weights."""
    path = work / "model.gguf"

    def run(content: bytes) -> Any:
        path.write_bytes(content)
        AutoEasyDeLModelForCausalLM.from_pretrained(path)

    return _files(work), run, True

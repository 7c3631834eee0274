"""Tokenizer folders: each of their files damaged or bent, then loaded and given a row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from easydel import load_tokenizer
from easydel.data import PreferenceTransform
from tests.fuzz.inputs import SEEDS, bent, json_text, mutate_bytes
from tests.fuzz.made import ROWS, TEMPLATES, model_folder

# What a tokenizer_config.json may say besides, some of it dangerous.
EXTRA = {
    "auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]},
    "tokenizer_class": "LlamaTokenizerFast",
    "model_max_length": 2048,
    "chat_template": TEMPLATES[0],
    "added_tokens_decoder": {"0": {"content": "<pad>", "special": True}},
    "add_bos_token": True,
}
SPECIAL_TOKENS = {
    "bos_token": "<s>",
    "eos_token": {"content": "</s>", "lstrip": False},
    "additional_special_tokens": ["<x>"],
}


def folders(work: Path) -> Any:
    folder = model_folder(work / "model")
    originals = {path.name: path.read_bytes() for path in folder.iterdir() if "token" in path.name}
    originals["special_tokens_map.json"] = json.dumps(SPECIAL_TOKENS).encode()
    originals["chat_template.jinja"] = TEMPLATES[0].encode()
    tokenizer = json.loads(originals["tokenizer.json"])
    tokenizer["model"]["vocab"] = dict(list(tokenizer["model"]["vocab"].items())[:20])
    config = json.loads(originals["tokenizer_config.json"]) | EXTRA
    structured = {
        "tokenizer.json": bent(tokenizer),
        "tokenizer_config.json": bent(
            config, {name: value for name, value in config.items() if name != "chat_template"}
        ),
        "special_tokens_map.json": bent(SPECIAL_TOKENS),
        "chat_template.jinja": st.sampled_from([*TEMPLATES, "", "{{", "{{ 1 / 0 }}"]),
        "config.json": bent(json.loads((folder / "config.json").read_text())),
    }
    originals["config.json"] = (folder / "config.json").read_bytes()
    raw = st.builds(
        lambda name, seed: [name, "raw", mutate_bytes(originals[name], seed).hex()],
        st.sampled_from(sorted(originals)),
        SEEDS,
    )

    def run(given: list[Any]) -> Any:
        for name, content in originals.items():
            (folder / name).write_bytes(content)
        name, kind, content = given
        (folder / name).write_bytes(bytes.fromhex(content) if kind == "raw" else json_text(content).encode())
        transform = PreferenceTransform(load_tokenizer(folder))
        transform(ROWS[0])
        return transform(ROWS[2])

    changed = [st.tuples(st.just(name), st.just("json"), values).map(list) for name, values in structured.items()]
    return st.one_of(
        raw, *changed, structured["tokenizer_config.json"].map(lambda value: ["tokenizer_config.json", "json", value])
    ), run

"""A tiny model folder with a tokenizer, and data files, for the tests of the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

LLAMA = Path(__file__).parents[1] / "golden" / "families" / "llama"
SPECIALS = ["<unk>", "<s>", "</s>"]
CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:;!?'\n"
ROWS = [
    {"prompt": "What is two and two?", "chosen": " Four.", "rejected": " Perhaps five, or so."},
    {"prompt": "Name a colour.", "chosen": " Blue.", "rejected": " Seventeen."},
]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """A two-layer Llama of 96 tokens with a tokenizer that reads one character at a time."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    shutil.copytree(LLAMA, folder, ignore=shutil.ignore_patterns("*.npz"))
    vocabulary = {token: token_id for token_id, token in enumerate([*SPECIALS, *CHARACTERS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def train_file(tmp_path) -> Path:
    return write_rows(tmp_path / "train.jsonl", ROWS)

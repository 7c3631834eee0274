"""Check the JSON files of a tokenizer folder before `transformers` builds anything from them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from easydel.errors import listed, plain, shown
from easydel.infra.config_keys import Key
from easydel.weights.files import read_json

# Any one of these files is enough for a fast tokenizer; tokenizer_config.json alone is not.
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
TOKENIZER_CONFIG, TEMPLATE, TEMPLATE_FOLDER = (
    "tokenizer_config.json",
    "chat_template.jinja",
    "additional_chat_templates",
)
SETTING_FILES = (TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json")
TEMPLATE_FILES = (TEMPLATE, "chat_template.json")
# All files that a tokenizer is read from; no others are copied beside a model, and never code.
TOKENIZER_FILES = (*VOCABULARY_FILES, "merges.txt", "sentencepiece.bpe.model", *SETTING_FILES, *TEMPLATE_FILES)
MOST_BYTES = 1 << 29
MOST_TOKENS = 1 << 31
TOKEN_KEYS = frozenset({"__type", "content", "id", "lstrip", "normalized", "rstrip", "single_word", "special"})


def check_tokenizer_folder(folder: Path) -> None:
    """Refuse a folder without a tokenizer, or with settings of the wrong type.

    Raises:
      FileNotFoundError: the folder holds no tokenizer.
      ValueError: a file is no JSON object, is too large or no plain file, or a setting is of the wrong type.
    """
    if not any((folder / file).exists() for file in VOCABULARY_FILES):
        raise FileNotFoundError(
            f"{folder} holds no tokenizer: none of {', '.join(VOCABULARY_FILES)}. Copy the tokenizer files of the "
            "model it was made from into the folder."
        )
    for name in (*TOKENIZER_FILES, "config.json"):
        file = folder / name
        if file.exists() and (not file.is_file() or file.stat().st_size > MOST_BYTES):
            raise ValueError(f"{file} cannot be read: expected a plain file of at most {MOST_BYTES >> 20} MiB.")
    for name in SETTING_FILES:
        if (folder / name).exists():
            settings = read_json(folder / name)
            problems = added_token_problems(settings) if name == "added_tokens.json" else setting_problems(settings)
            if problems:
                raise ValueError(f"{folder / name} cannot be used:\n  {listed(problems)}")
    unknown = _added_tokens_keys(folder / "tokenizer.json") - TOKEN_KEYS
    if unknown:
        raise ValueError(
            f"{folder / 'tokenizer.json'} cannot be used: an added token has the key {shown(min(unknown))}, expected "
            f"{', '.join(sorted(TOKEN_KEYS))}."
        )


def _added_tokens_keys(file: Path) -> frozenset[str]:
    """The keys of added tokens in a file; `tokenizers` would only print those it does not know, and ignore them."""
    if not file.exists():
        return frozenset()
    text = file.read_bytes().decode("utf-8", "replace")
    # The rest of the file, the vocabulary, takes a hundred times as long to parse and is left to `tokenizers`.
    opening = re.search(r'"added_tokens"\s*:\s*(?=\[)', text)
    try:
        tokens = json.JSONDecoder().raw_decode(text, opening.end())[0] if opening else []
    except (ValueError, RecursionError):  # reported when the file is read whole
        return frozenset()
    return frozenset(key for token in tokens if isinstance(token, dict) for key in token)


def setting_problems(settings: Mapping[str, Any]) -> list[str]:
    """List the wrong settings of a ``tokenizer_config.json`` or ``special_tokens_map.json``, one sentence each."""
    problems = []
    for name, value in settings.items():
        key = EXPECTED.get(name, TOKEN if name.endswith("_token") else None)
        if value is not None and key is not None and not key.accepts(value):
            problems.append(f"{plain(name)} is {shown(value)}, expected {key.expected}")
    return problems


def added_token_problems(tokens: Mapping[str, Any]) -> list[str]:
    """List the wrong entries of an ``added_tokens.json``."""
    return [
        f"{plain(token)} is {shown(value)}, expected a token id" for token, value in tokens.items() if not _is_id(value)
    ]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MOST_TOKENS


def _is_token(value: Any) -> bool:
    content = value.get("content") if isinstance(value, dict) else value
    is_known = not isinstance(value, dict) or value.keys() <= TOKEN_KEYS
    return isinstance(content, str) and content != "" and is_known


def _are_tokens(value: Any) -> bool:
    """Special tokens in a list or, by a name for each, in an object."""
    return isinstance(value, (list, dict)) and all(map(_is_token, value.values() if isinstance(value, dict) else value))


def _are_tokens_by_id(value: Any) -> bool:
    return isinstance(value, dict) and all(
        name.isdecimal() and len(name) < 12 and _is_id(int(name)) and isinstance(token, dict) and _is_token(token)
        for name, token in value.items()
    )


def _is_length(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def _is_template(value: Any) -> bool:
    if isinstance(value, list):
        return all(
            isinstance(one, dict) and _is_text(one.get("name")) and _is_text(one.get("template")) for one in value
        )
    return _is_text(value) or (isinstance(value, dict) and all(map(_is_text, value.values())))


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and Path(name).name == name for name in value)


TOKEN = Key(expected="a token, as text or as an object with its content and the keys of a token", accepts=_is_token)
TOKENS = Key(expected="a list of tokens, none of them empty", accepts=_are_tokens)
FLAG = Key(expected="true or false", accepts=lambda value: isinstance(value, bool))
TEXT = Key(expected="text", accepts=_is_text)
SIDE = Key(expected="left or right", accepts=lambda value: value in ("left", "right"))
# Arguments of a tokenizer's class that no model's file may set: they open other files or replace parts of it.
NEVER = Key(expected="nothing: no file of a model sets this", accepts=lambda value: value in ([], {}))
EXPECTED: dict[str, Key] = {
    "add_bos_token": FLAG,
    "add_eos_token": FLAG,
    "add_prefix_space": FLAG,
    "clean_up_tokenization_spaces": FLAG,
    "split_special_tokens": FLAG,
    "tokenizer_class": TEXT,
    "padding_side": SIDE,
    "truncation_side": SIDE,
    "model_max_length": Key(expected="a number above 0", accepts=_is_length),
    "additional_special_tokens": TOKENS,
    "extra_special_tokens": TOKENS,
    "model_specific_special_tokens": TOKENS,
    "added_tokens_decoder": Key(
        expected="tokens with their content and the keys of a token, by token id", accepts=_are_tokens_by_id
    ),
    "chat_template": Key(expected="a template, or a list of templates with their names", accepts=_is_template),
    "auto_map": Key(expected="a list or an object", accepts=lambda value: isinstance(value, (list, dict))),
    "fast_tokenizer_files": Key(expected="names of files of the folder", accepts=_are_names),
    "model_input_names": Key(
        expected="a list of names", accepts=lambda value: isinstance(value, list) and all(map(_is_text, value))
    ),
    "gguf_file": NEVER,
    "init_inputs": NEVER,
    "tokenizer_object": NEVER,
}

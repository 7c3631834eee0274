"""Build a Hugging Face tokenizer from the vocabulary inside a ``.gguf`` model file."""

import os
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from easydel.infra.config_keys import Key
from easydel.weights.gguf.header import COUNT, FLAG, NUMBERS, SIZE, TEXT, TEXTS, checked, read_header

_CONTROL, _USER_DEFINED = 3, 4


class PreTokenizer(NamedTuple):
    """The steps of a byte-level BPE before its merges, which differ between models."""

    pattern: str | None = None  # matches one piece of text; None is GPT-2's, which `tokenizers` has built in
    single_digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False  # a piece that is a token stays whole, whatever the merges say
    adds_bos: bool = False  # unless the file says otherwise


_LLAMA_3 = PreTokenizer(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
    ignore_merges=True,
    adds_bos=True,
)
PRE_TOKENIZERS = {
    "default": PreTokenizer(),
    "gpt-2": PreTokenizer(),
    "smollm": PreTokenizer(single_digits=True),
    "qwen2": PreTokenizer(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+",
        nfc=True,
    ),
    "llama-bpe": _LLAMA_3,
    "llama3": _LLAMA_3,
}


def tokenizer_from_gguf(path: str | os.PathLike[str]) -> PreTrainedTokenizerFast:
    """The byte-level BPE tokenizer of a GGUF file, with its special tokens and chat template.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is no GGUF model, or the kind of its tokenizer or pre-tokeniser is not known.
    """
    path = Path(path)
    metadata = read_header(path).metadata
    architecture = _optional(path, metadata, "general.architecture", TEXT, None)
    pre_tokenizer = _pre_tokenizer(path, metadata)
    tokens, kinds = _need(path, metadata, "tokens", TEXTS), _need(path, metadata, "token_type", NUMBERS)
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens) or len(kinds) != len(tokens):
        raise ValueError(
            f"{path} has {len(tokens)} tokens, {len(vocabulary)} of them different, and {len(kinds)} token types; "
            "expected the same number of each. The file is damaged."
        )
    # A byte-level token holds no space, so a merge has one space, between its two sides.
    merges = [tuple(merge.split(" ")) for merge in _need(path, metadata, "merges", TEXTS)]
    for rank, merge in enumerate(merges):
        if len(merge) != 2 or not vocabulary.keys() >= {*merge, "".join(merge)}:
            raise ValueError(
                f"{path}: tokenizer.ggml.merges[{rank}] is {reprlib.repr(' '.join(merge))}, expected two tokens of the "
                "vocabulary that make a third. The file is damaged."
            )
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre_tokenizer.ignore_merges))
    if pre_tokenizer.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _splitter(pre_tokenizer)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind == _CONTROL, normalized=False)
            for token, kind in zip(tokens, kinds)
            if kind in (_CONTROL, _USER_DEFINED)
        ]
    )

    named = {
        name: _token(path, metadata, key, tokens)
        for name, key in (
            ("bos_token", "bos_token_id"),
            ("eos_token", "eos_token_id"),
            ("unk_token", "unknown_token_id"),
            ("pad_token", "padding_token_id"),
        )
    }
    before, after = [], []
    if _optional(path, metadata, "tokenizer.ggml.add_bos_token", FLAG, pre_tokenizer.adds_bos):
        before = [named["bos_token"]]
    if _optional(path, metadata, "tokenizer.ggml.add_eos_token", FLAG, False):
        after = [named["eos_token"]]
    if None in before + after:
        raise ValueError(f"{path} asks for a BOS or EOS around every text but names no such token; convert it again.")
    if before or after:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *(f"{token}:1" for token in before), "$B:1", *(f"{t}:1" for t in after)],
            special_tokens=[(token, vocabulary[token]) for token in {*before, *after}],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=_optional(path, metadata, "tokenizer.chat_template", TEXT, None),
        model_max_length=_optional(path, metadata, f"{architecture}.context_length", SIZE, None),
        clean_up_tokenization_spaces=False,
        **named,
    )


def _pre_tokenizer(path: Path, metadata: Mapping[str, Any]) -> PreTokenizer:
    kind = metadata.get("tokenizer.ggml.model")
    if kind != "gpt2":
        # A GGUF file does not say how a SentencePiece model treats the space after a special token.
        raise ValueError(
            f"{path}: tokenizer.ggml.model is {reprlib.repr(kind)}, expected 'gpt2' (byte-level BPE). "
            "Pass the folder of the model's own tokenizer."
        )
    name = metadata.get("tokenizer.ggml.pre")
    if not isinstance(name, str) or name not in PRE_TOKENIZERS:
        raise ValueError(
            f"{path}: tokenizer.ggml.pre is {reprlib.repr(name)}, expected one of {', '.join(PRE_TOKENIZERS)}. "
            "Pass the folder of the model's own tokenizer."
        )
    return PRE_TOKENIZERS[name]


def _splitter(pre_tokenizer: PreTokenizer) -> pre_tokenizers.PreTokenizer:
    if pre_tokenizer.pattern is not None:
        split = pre_tokenizers.Split(Regex(pre_tokenizer.pattern), behavior="isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre_tokenizer.single_digits:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    return byte_level


def _need(path: Path, metadata: Mapping[str, Any], key: str, kind: Key) -> list[Any]:
    if f"tokenizer.ggml.{key}" not in metadata:
        raise ValueError(f"{path} has no tokenizer.ggml.{key}; pass the folder of the model's own tokenizer.")
    return checked(path, f"tokenizer.ggml.{key}", metadata[f"tokenizer.ggml.{key}"], kind)


def _optional(path: Path, metadata: Mapping[str, Any], key: str, kind: Key, default: Any) -> Any:
    return checked(path, key, metadata[key], kind) if key in metadata else default


def _token(path: Path, metadata: Mapping[str, Any], key: str, tokens: list[str]) -> str | None:
    token_id = _optional(path, metadata, f"tokenizer.ggml.{key}", COUNT, None)
    if token_id is not None and token_id >= len(tokens):
        raise ValueError(f"{path}: tokenizer.ggml.{key}={token_id}, expected less than {len(tokens)}, its token count.")
    return None if token_id is None else tokens[token_id]

"""The tokenizer of a model: a Hugging Face folder, a hub id or a ``.gguf`` file."""

from __future__ import annotations

import re
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from easydel.infra.gguf_tokenizer import tokenizer_from_gguf

# Any one of them is enough for a fast tokenizer; tokenizer_config.json alone is not.
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerFast:
    """Load a tokenizer and nothing else: no weights are read or downloaded, and no code of the model is run.

    Raises:
      FileNotFoundError: there is no such model, or its folder holds no tokenizer.
      ValueError: the tokenizer's files cannot be read, or make no fast tokenizer.
    """
    path, name = Path(name_or_path).expanduser(), str(name_or_path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"{path} is a file; expected a Hugging Face folder or a .gguf file.")
        return tokenizer_from_gguf(path)
    if path.is_dir():
        if not any((path / file).exists() for file in VOCABULARY_FILES):
            raise FileNotFoundError(
                f"{path} holds no tokenizer: none of {', '.join(VOCABULARY_FILES)}. Copy the tokenizer files of the "
                "model it was made from into the folder."
            )
        return _load(str(path))
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise FileNotFoundError(f'"{name}" is neither a folder, a .gguf file nor a hub id such as "org/model".')
    return _load(name)


def _load(name: str) -> PreTrainedTokenizerFast:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except OSError as error:
        raise FileNotFoundError(
            f'"{name}" is no local folder, and the hub did not give its tokenizer. Check the name and the connection, '
            f"or pass the folder of a downloaded model. ({_first_line(error)})"
        ) from error
    # `tokenizers` reports a damaged tokenizer.json as a plain Exception, and a surprising one as KeyError or TypeError.
    except Exception as error:
        raise ValueError(f"the tokenizer of {name} cannot be read: {_first_line(error)}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(
            f"{name} has a {type(tokenizer).__name__}, expected a fast tokenizer: offsets are needed to find where a "
            "completion starts. Save it once as tokenizer.json."
        )
    return tokenizer


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]

"""Load a model's tokenizer from a Hugging Face folder, a hub id or a ``.gguf`` file, and save it."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from easydel.errors import shown
from easydel.paths import HUB_ID, user_path
from easydel.tokenizer.settings import (
    TEMPLATE,
    TEMPLATE_FILES,
    TEMPLATE_FOLDER,
    TOKENIZER_CONFIG,
    TOKENIZER_FILES,
    check_tokenizer_folder,
)
from easydel.weights.files import is_inside, read_json, replacing_files
from easydel.weights.gguf.tokenizer import tokenizer_from_gguf
from easydel.weights.hugging_face import CONFIG

logger = logging.getLogger("easydel")

HUB_FILES = [*TOKENIZER_FILES, f"{TEMPLATE_FOLDER}/*.jinja", CONFIG]
# Settings with which `transformers` 5 describes how a tokenizer was loaded, rather than the tokenizer.
PRIVATE_SETTINGS = ("backend", "files_loaded", "is_local", "local_files_only", "vocab_file")
STATED_SETTINGS = ("padding_side", "truncation_side", "clean_up_tokenization_spaces", "split_special_tokens")
PRETRAINED_CLASS = "PreTrainedTokenizerFast"


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerFast:
    """Load a tokenizer and nothing else: no weights are read or downloaded, and no code of the model is run.

    Args:
      name_or_path: Hugging Face folder, ``org/name`` on the hub, or ``.gguf`` file.

    Raises:
      FileNotFoundError: there is no such model, or its folder holds no tokenizer.
      ValueError: the tokenizer's files cannot be read, or make no fast tokenizer.
    """
    path, name = user_path(name_or_path), str(name_or_path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"{path} is a file; expected a Hugging Face folder or a .gguf file.")
        return tokenizer_from_gguf(path)
    if path.is_dir():
        return _load_folder(path, str(path))
    if not HUB_ID.fullmatch(name):
        raise FileNotFoundError(f'{shown(name)} is neither a folder, a .gguf file nor a hub id such as "org/model".')
    try:
        return _load_folder(Path(snapshot_download(name, allow_patterns=HUB_FILES)), name)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(
            f'"{name}" is no local folder, and the hub did not give its tokenizer. Check the name and the connection, '
            f"or pass the folder of a downloaded model. ({_first_line(error)})"
        ) from error


def save_tokenizer(tokenizer: Any, folder: str | Path) -> None:
    """Write a tokenizer's files, unchanged wherever they still describe it.

    The files that it was loaded from are copied byte for byte; a chat template that was set since replaces theirs. A
    tokenizer that was changed otherwise, or has no files, is written by its own `save_pretrained`, in settings that
    `transformers` 4.57 and later read alike.

    Args:
      tokenizer: a tokenizer, a processor, or any object with `save_pretrained`; for others a warning is logged.
      folder: the folder to write to, made if absent.

    Raises:
      OSError: the folder cannot be written; files that were there stay.
    """
    folder = user_path(folder)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        if not hasattr(tokenizer, "save_pretrained"):
            logger.warning("the %s has no save_pretrained: %s has no tokenizer.", type(tokenizer).__name__, folder)
            return
        tokenizer.save_pretrained(str(folder))
        if (folder / TOKENIZER_CONFIG).is_file():
            _write_for_all_versions(folder / TOKENIZER_CONFIG)
        return
    with replacing_files(folder) as new:
        if not _copy_files(tokenizer, new):
            with _quiet():
                tokenizer.save_pretrained(str(new))
            # save_pretrained does not write these where they were set after the tokenizer was made.
            stated = {name: getattr(tokenizer, name) for name in STATED_SETTINGS}
            _write_for_all_versions(new / TOKENIZER_CONFIG, stated)
        # Files of another tokenizer would be read beside the new ones.
        for name in TOKENIZER_FILES:
            if not (new / name).exists():
                (folder / name).unlink(missing_ok=True)
        templates = folder / TEMPLATE_FOLDER
        if templates.is_dir() and not templates.is_symlink():
            shutil.rmtree(templates)


def _load_folder(folder: Path, name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder; `name` is the user's name for it, for messages."""
    check_tokenizer_folder(folder)
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(
                str(folder), config=_model_of(folder, name), trust_remote_code=False, local_files_only=True
            )
            tokenizer.convert_ids_to_tokens([token for token in tokenizer.all_special_ids if token is not None])
    # `tokenizers` reports a damaged tokenizer.json as a plain Exception, an unexpected one as KeyError or TypeError,
    # and its own bugs as a PanicException, which is no Exception.
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit)):
            raise
        raise ValueError(f"the tokenizer of {name} cannot be read: {_first_line(error)}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(
            f"{name} has a {type(tokenizer).__name__}, expected a fast tokenizer: offsets are needed to find where a "
            "completion starts. Save it once as tokenizer.json."
        )
    return tokenizer


def _model_of(folder: Path, name: str) -> PreTrainedConfig:
    """The part of ``config.json`` that chooses a tokenizer's class; its numbers, which size arrays, are not read."""
    raw = read_json(folder / CONFIG) if (folder / CONFIG).exists() else {}
    model_type, tokenizer_class = raw.get("model_type"), raw.get("tokenizer_class")
    if isinstance(model_type, str) and model_type in CONFIG_MAPPING:
        config = AutoConfig.for_model(model_type)
    else:
        config = PreTrainedConfig()
    config._name_or_path = name
    if isinstance(tokenizer_class, str):
        config.tokenizer_class = tokenizer_class
    return config


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the remarks of `transformers` on a tokenizer: they are advice for other programs."""
    library = logging.getLogger("transformers")
    level = library.level
    library.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        library.setLevel(level)


def _copy_files(tokenizer: PreTrainedTokenizerFast, folder: Path) -> bool:
    """Copy the files a tokenizer was loaded from, where they describe all of it but its chat template.

    Returns:
      Whether the files were copied; False leaves the folder as it was.
    """
    source = _source(tokenizer)
    if source is None:
        return False
    files = [source / name for name in TOKENIZER_FILES if (source / name).exists()]
    files += sorted((source / TEMPLATE_FOLDER).glob("*.jinja"))
    if not all(file.is_file() and is_inside(source, file) for file in files):  # no links to anything else
        return False
    try:
        original = _load_folder(source, str(source))
    except (ValueError, FileNotFoundError):
        return False
    template = tokenizer.chat_template
    is_new = template != original.chat_template
    if _state(tokenizer) != _state(original) or (is_new and isinstance(template, dict)):
        return False
    for file in files:
        if is_new and (file.name in TEMPLATE_FILES or file.parent != source):
            continue
        copy = folder / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)
    if is_new:
        _write_template(folder, template)
    return True


def _source(tokenizer: PreTrainedTokenizerFast) -> Path | None:
    """The folder a tokenizer was loaded from, or the snapshot of its hub id that is here already."""
    name = str(tokenizer.name_or_path or "")
    if name and Path(name).is_dir():
        return Path(name)
    if not HUB_ID.fullmatch(name):
        return None
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError, OSError):
        return None


def _state(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """All that a tokenizer's files describe, except the chat template."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # These are left over from the last call that padded or truncated.
    backend |= {"padding": None, "truncation": None}
    return {
        "backend": backend,
        "class": type(tokenizer),
        "special tokens": tokenizer.special_tokens_map,
        "more special tokens": [str(token) for token in tokenizer.extra_special_tokens],
        "model_max_length": tokenizer.model_max_length,
        "settings": [getattr(tokenizer, name) for name in STATED_SETTINGS],
        "inputs": list(tokenizer.model_input_names),
    }


def _write_template(folder: Path, template: str | None) -> None:
    """Write a chat template in place of that of a tokenizer's copied files."""
    config = folder / TOKENIZER_CONFIG
    settings = read_json(config) if config.exists() else {}
    if "chat_template" in settings:
        del settings["chat_template"]
        _write_settings(config, settings)
    if template is not None:
        (folder / TEMPLATE).write_text(template, encoding="utf-8", newline="\n")


def _write_for_all_versions(file: Path, stated: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Rewrite a ``tokenizer_config.json`` of `transformers` 5 in settings that 4.57 reads as well.

    ``tokenizer.json`` beside it describes the tokenisation completely, and `PreTrainedTokenizerFast` follows it in both
    versions; other classes may add to it, differently in each version.
    """
    settings = {name: value for name, value in read_json(file).items() if name not in PRIVATE_SETTINGS} | dict(stated)
    if (file.parent / "tokenizer.json").is_file():
        settings["tokenizer_class"] = PRETRAINED_CLASS
    extra = settings.get("extra_special_tokens")
    if isinstance(extra, list):
        del settings["extra_special_tokens"]
        settings["additional_special_tokens"] = extra
    if "model_specific_special_tokens" in settings:
        settings["extra_special_tokens"] = settings.pop("model_specific_special_tokens")
    _write_settings(file, settings)


def _write_settings(file: Path, settings: dict[str, Any]) -> None:
    file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _first_line(error: BaseException) -> str:
    text = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
    return text if len(text) <= 300 and text.isprintable() else shown(text, 300)

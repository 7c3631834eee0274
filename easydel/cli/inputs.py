"""Open and check the tokenizer and the rows before anything expensive starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from easydel.cli.failures import UsageError, refusing
from easydel.paths import user_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from easydel.data.sources.base import ShardedDataSource
    from easydel.data.sources.mixture import MixtureSource


def open_tokenizer(model: str, chat_template: str | None) -> PreTrainedTokenizerFast:
    """Load the model's tokenizer, with the chat template of a file instead of its own if one is named.

    Raises:
      UsageError: the tokenizer or the template cannot be used.
    """
    from easydel.tokenizer.tokenizer import load_tokenizer

    with refusing(OSError, ValueError):
        tokenizer = load_tokenizer(model)
    if chat_template is not None:
        tokenizer.chat_template = read_chat_template(chat_template)
    return tokenizer


def read_chat_template(file: str) -> str:
    """Read the chat template in a file, and compile it once as a check.

    Raises:
      UsageError: it cannot be read, or is no template.
    """
    from easydel.data.preference.template_process import TemplateFailure, shared_process
    from easydel.data.preference.template_worker import TEMPLATE_CHARACTERS

    try:
        # A byte order mark would be rendered into every row.
        with user_path(file).open(encoding="utf-8-sig") as stream:
            template = stream.read(TEMPLATE_CHARACTERS + 1)
    except OSError as error:
        raise UsageError(f"the chat template {file} cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"the chat template {file} is not UTF-8 text: {error}.") from error
    if len(template) > TEMPLATE_CHARACTERS:
        raise UsageError(f"the chat template {file} has more than {TEMPLATE_CHARACTERS} characters.")
    if "{{" not in template and "{%" not in template:
        raise UsageError(f"{file} is no chat template: it holds neither {{{{ ... }}}} nor {{% ... %}}.")
    try:
        shared_process().compile(template)
    except TemplateFailure as failure:
        raise UsageError(f"the chat template {file} cannot be used: {failure}.") from failure
    return template


def open_rows(files: str | Sequence[str]) -> ShardedDataSource:
    """Open the rows of one or more files.

    Raises:
      UsageError: a file is missing, of an unknown format or damaged.
    """
    from easydel.data.sources.open_source import open_source

    # ValueError covers unknown suffixes, DataError, and pyarrow's errors about damaged files.
    with refusing(OSError, ValueError):
        return open_source(files)


def open_mixture(weights: Mapping[str, float]) -> MixtureSource:
    """Open several files, folders or globs as one mixture in the proportions of their weights; print the rows of each.

    Raises:
      UsageError: a weight is not above 0, or a file cannot be used.
    """
    from easydel.data.sources.mixture import MixtureSource

    for file, weight in weights.items():
        if not weight > 0:
            raise UsageError(f"{file}={weight:g} in train_dataset: expected a weight above 0; leave the file out.")
    sources = [open_rows(file) for file in weights]
    with refusing(OSError, ValueError):
        mixture = MixtureSource(sources, list(weights.values()))
        if mixture.has_random_access:
            used = zip(weights, mixture.rows_used, map(len, sources))
            print("mixture: " + "; ".join(f"{rows} of {length} rows of {file}" for file, rows, length in used))
    return mixture

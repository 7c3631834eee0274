"""Tokenizer and rows, opened and looked at before anything expensive starts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from easydel.cli.failures import UsageError, refusing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from easydel.data.sources import ShardedDataSource


def open_tokenizer(model: str, chat_template: str | None) -> PreTrainedTokenizerFast:
    """The model's tokenizer, with the chat template of a file in place of its own if one is named."""
    from easydel.infra.tokenizer import load_tokenizer

    with refusing(OSError, ValueError):
        tokenizer = load_tokenizer(model)
    if chat_template is not None:
        try:
            tokenizer.chat_template = Path(chat_template).expanduser().read_text(encoding="utf-8")
        except OSError as error:
            raise UsageError(f"the chat template {chat_template} cannot be read: {error.strerror}.") from error
        except UnicodeDecodeError as error:
            raise UsageError(f"the chat template {chat_template} is not UTF-8 text: {error}.") from error
    return tokenizer


def open_rows(files: str | Sequence[str]) -> ShardedDataSource:
    """The rows of one or more files."""
    from easydel.data.open_source import open_source

    # ValueError covers unknown suffixes, DataError, and what pyarrow says of damaged files.
    with refusing(OSError, ValueError):
        return open_source(files)

"""What is tried: every target draws inputs and runs one of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st


@dataclass(frozen=True)
class Target:
    """Something that reads what others wrote.

    Attributes:
      name: how the command line calls it.
      strategy: draws an input, bytes or JSON.
      run: reads it; returns anything, a `RowFault`, or raises.
      binary: whether inputs are bytes.
    """

    name: str
    strategy: st.SearchStrategy[Any]
    run: Callable[[Any], Any]
    binary: bool = False


# Name -> the module and function that make the target, so that a process imports only what its target needs.
TARGETS: dict[str, str] = {
    "checkpoints": "checkpoints:damaged_notes",  # the slowest first, so that nothing waits for it
    "rows.text": "rows:text",
    "rows.messages": "rows:messages_and_text",
    "rows.hostile": "rows:hostile",
    "templates": "templates:programs",
    "files.jsonl": "files:json_lines",
    "files.json": "files:json_list",
    "files.csv": "files:comma_separated",
    "files.tsv": "files:tab_separated",
    "files.compressed": "files:compressed",
    "files.parquet": "files:parquet",
    "files.arrow": "files:arrow",
    "files.feather": "files:feather",
    "files.saved_dataset": "files:saved_dataset",
    "tokenizer": "tokenizers:folders",
    "gguf.tokenizer": "gguf:tokenizers",
    "gguf.model": "gguf:models",
    "config": "models:configs",
    "index": "models:indices",
    "safetensors": "models:weights",
    "adapters": "models:adapters",
    "yaml": "command_line:run_files",
    "arguments": "command_line:arguments",
    "show": "command_line:shown",
}


def load(name: str, work: Path) -> Target:
    """The target of a name; `work` is a folder of its own for files."""
    module, function = TARGETS[name].split(":")
    strategy, run, *binary = getattr(importlib.import_module(f"{__name__}.{module}"), function)(work)
    return Target(name, strategy, run, *binary)

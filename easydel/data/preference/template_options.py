"""Do the options of the chat template change anything?"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from easydel.data.faults import RowFault
from easydel.data.preference.transform import PreferenceTransform
from easydel.data.tree import PreferencePair

ROWS = 16


def refuse_inert_template_options(rows: Iterable[Mapping[str, Any]], transform: PreferenceTransform) -> None:
    """Refuse ``tools`` and ``chat_template_kwargs`` that leave the first rows' tokens as they are without them.

    Rows of plain text use no template, a template may not know what it is given, and a row's own column wins.

    Raises:
      ValueError: names the option and the key.
    """
    without: dict[str, PreferenceTransform] = {}
    if transform.tools is not None:
        without["tools"] = dataclasses.replace(transform, tools=None)
    for key in transform.chat_template_kwargs or {}:
        others = {name: value for name, value in (transform.chat_template_kwargs or {}).items() if name != key}
        without[f"chat_template_kwargs[{key!r}]"] = dataclasses.replace(transform, chat_template_kwargs=others)
    if not without:
        return
    first = list(itertools.islice(rows, ROWS))
    for option, other in without.items():
        if all(_same(transform(row), other(row)) for row in first):
            raise ValueError(
                f"{option} has no effect: the first {len(first)} rows give the same tokens without it. Rows of plain "
                "text use no chat template, the tokenizer's template may not use it, and a row's own column wins; "
                "leave it out, or mend the template or the rows."
            )


def _same(a: PreferencePair | RowFault, b: PreferencePair | RowFault) -> bool:
    if isinstance(a, RowFault) or isinstance(b, RowFault):
        return a == b
    parts = ("prompt_ids", "chosen_ids", "rejected_ids")
    return all(np.array_equal(getattr(a, part), getattr(b, part)) for part in parts)

"""The real rows that every contender trains on, rendered to plain text."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

DATA = Path(__file__).parents[1] / ".." / "shared" / "data"
# Name of a set -> files of which it takes equal parts.
SETS = {
    "short": ("pandalm_human.jsonl",),
    "long": ("llamafactory_dpo_en_demo.jsonl",),
    "mixed": ("pandalm_human.jsonl", "llamafactory_dpo_en_demo.jsonl"),
}
SEED = 0


@dataclasses.dataclass(frozen=True)
class TextRow:
    """A pair as plain text, and its numbers of tokens: whoever tokenises prompt and completions gets these."""

    prompt: str
    chosen: str
    rejected: str
    tokens: tuple[int, int, int]


def render(row: dict[str, Any], tokenizer: Any, max_length: int) -> TextRow | str:
    """One row with the chat template applied, or why it is not fit to compare trainers with.

    The prompt ends where the model is to answer, a completion is its content and one stop token. Rows are left out
    where trainers may differ in what they train on: those that would be cut, and those whose tokens depend on whether
    prompt and completion are tokenised together.
    """
    prompt = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
    sides = []
    for side in ("chosen", "rejected"):
        (message,) = row[side]
        sides.append(message["content"] + tokenizer.eos_token)
    prompt_ids, *side_ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, *sides))
    for text, ids in zip(sides, side_ids):
        if tokenizer(prompt + text, add_special_tokens=False)["input_ids"] != prompt_ids + ids:
            return "prompt and completion share a token"
        if ids.count(tokenizer.eos_token_id) != 1:
            return "a stop token within a completion"
        if len(prompt_ids) + len(ids) > max_length:
            return f"longer than {max_length} tokens"
    return TextRow(prompt, *sides, tokens=(len(prompt_ids), *map(len, side_ids)))


def choose(files: Sequence[Path], count: int, tokenizer: Any, max_length: int) -> tuple[list[TextRow], dict[str, int]]:
    """`count` rows in a fixed random order, equally many of each file, and how many were left out for which reason.

    Raises:
      ValueError: a file has too few rows that are fit.
    """
    random = np.random.default_rng(SEED)
    chosen: list[TextRow] = []
    reasons: dict[str, int] = {}
    for number, file in enumerate(files):
        wanted = count // len(files) + (number < count % len(files))
        lines = file.read_text(encoding="utf-8").splitlines()
        order = iter(random.permutation(len(lines)))
        found: list[TextRow] = []
        while len(found) < wanted:
            index = next(order, None)
            if index is None:
                raise ValueError(f"{file} has {len(found)} rows that are fit, {wanted} are wanted: {reasons}.")
            row = render(json.loads(lines[index]), tokenizer, max_length)
            if isinstance(row, str):
                reasons[row] = reasons.get(row, 0) + 1
            else:
                found.append(row)
        chosen += found
    return [chosen[index] for index in random.permutation(len(chosen))], reasons


def tokens_of_updates(rows: Sequence[TextRow], pairs: int) -> list[list[int]]:
    """Tokens of prompts, chosen and rejected completions of every update."""
    updates = [rows[start : start + pairs] for start in range(0, len(rows), pairs)]
    return [[sum(row.tokens[part] for row in update) for part in range(3)] for update in updates]


def write_rows(rows: Sequence[TextRow], file: Path) -> None:
    """JSON lines of prompt, chosen and rejected."""
    with file.open("w", encoding="utf-8") as lines:
        for row in rows:
            lines.write(json.dumps({"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected}) + "\n")

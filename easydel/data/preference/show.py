"""A pair as the trainer sees it, for a terminal: special tokens, white space, cuts, and what carries loss.

Everything that colour says is also said by a mark, so that it reads the same in a pipe or under NO_COLOR.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby

import numpy as np
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.text import Text

from easydel.data.faults import RowFault
from easydel.data.preference.tokenise import Tokenizer
from easydel.data.preference.transform import PreferencePair
from easydel.data.visible import HIDDEN, visible

SPECIAL_STYLE = "bold magenta"
SPACE_STYLE = "dim cyan"
UNSCORED_STYLE = "dim"
COLOURS = {"prompt": "blue", "chosen": "green", "rejected": "red"}
PIECES = re.compile(rf"(\n|\t|\r|{HIDDEN.pattern}|^ +| +$| +(?=\n)| {{2,}})")
LEGEND = "[token] special   ↵ newline   → tab   · space that would not show   «text» read, but not scored"


def render_pair(pair: PreferencePair, tokenizer: Tokenizer) -> RenderableType:
    """Prompt, chosen and rejected in a box each, with their token counts; scored text is underlined."""
    unscored = np.zeros(len(pair.prompt_ids), bool)
    parts = (
        ("prompt", pair.prompt_ids, unscored, pair.prompt_truncated),
        ("chosen", pair.chosen_ids, pair.chosen_loss_mask, pair.chosen_truncated),
        ("rejected", pair.rejected_ids, pair.rejected_loss_mask, pair.rejected_truncated),
    )
    boxes = [_box(part, ids, scored, cut, tokenizer) for part, ids, scored, cut in parts]
    return Group(Text(_heading(pair)), *boxes, Text(LEGEND, style="dim"))


def render_fault(fault: RowFault, location: str = "") -> RenderableType:
    """Why a row is not used; `location` says where it is, such as "train.jsonl, row 812"."""
    body = Text(visible(fault.message))
    if fault.structural:
        body.append("\nThis concerns every row: training would stop before it starts.", style="bold")
    where = visible(location) or f"row {fault.index}"
    return Panel(
        body, title=Text(f"✗ {where}: {fault.reason} ({visible(fault.field)})"), title_align="left", border_style="red"
    )


def _heading(pair: PreferencePair) -> str:
    facts = [f"row {pair.index}" if pair.index >= 0 else "one row"]
    if pair.weight != 1.0:
        facts.append(f"weight {pair.weight:g}")
    if pair.ref_chosen_logps is not None:
        facts.append(f"given reference log-probs {pair.ref_chosen_logps:g} and {pair.ref_rejected_logps:g} nats")
    return ", ".join(facts)


def _box(part: str, ids: np.ndarray, scored: np.ndarray, cut: int, tokenizer: Tokenizer) -> Panel:
    title = f"{part}: {_tokens(len(ids))}"
    if part != "prompt":
        title += f", {int(scored.sum())} scored"
    if cut:
        title += f", {_tokens(cut)} cut off"
    body = Text()
    for text, special, carries_loss in _runs(ids, scored, tokenizer):
        quiet = part != "prompt" and not carries_loss
        style = UNSCORED_STYLE if quiet else f"{COLOURS[part]} underline" if carries_loss else COLOURS[part]
        body.append("«" if quiet else "", style=SPACE_STYLE)
        if special:
            body.append(f"[{visible(text)}]", style=f"{SPECIAL_STYLE} underline" if carries_loss else SPECIAL_STYLE)
        else:
            _append_visibly(body, text, style)
        body.append("»" if quiet else "", style=SPACE_STYLE)
    if cut and part != "prompt":
        body.append(f" … {_tokens(cut)} cut off", style=SPACE_STYLE)
    if body.plain.endswith("\n"):
        body.right_crop(1)
    return Panel(body, title=Text(title), title_align="left", border_style=COLOURS[part])


def _runs(ids: np.ndarray, scored: np.ndarray, tokenizer: Tokenizer) -> Iterator[tuple[str, bool, bool]]:
    """Text, whether it is one special token, and whether it carries loss; neighbours that are alike are joined."""
    special_ids = frozenset(tokenizer.all_special_ids)
    kinds = [(token if token in special_ids else -1, bool(loss)) for token, loss in zip(ids.tolist(), scored.tolist())]
    end = 0
    for (special_id, carries_loss), group in groupby(kinds):
        start, end = end, end + len(list(group))
        if special_id >= 0:
            written = tokenizer.convert_ids_to_tokens([special_id])[0]
            yield from ((written, True, carries_loss) for _ in range(start, end))
        else:
            yield _decode(ids[:end].tolist(), start, tokenizer), False, carries_loss


def _decode(ids: list[int], start: int, tokenizer: Tokenizer) -> str:
    """The text of ids[start:], with the space that some tokenizers only write behind other tokens."""
    before, whole = tokenizer.decode(ids[:start]), tokenizer.decode(ids)
    return whole[len(before) :] if start and whole.startswith(before) else tokenizer.decode(ids[start:])


def _append_visibly(body: Text, text: str, style: str) -> None:
    """Adds text with its newlines, tabs and hidden characters marked, and spaces where they would not be seen."""
    for piece in PIECES.split(text):
        if piece == "\n":
            body.append("↵\n", style=SPACE_STYLE)
        elif piece == "\t":
            body.append("→\t", style=SPACE_STYLE)
        elif piece == "\r":
            body.append("␍", style=SPACE_STYLE)
        elif HIDDEN.fullmatch(piece):
            body.append(visible(piece), style=SPACE_STYLE)
        elif piece and not piece.strip(" "):
            hidden = len(piece) > 1 or text.startswith(piece) or text.endswith(piece)
            body.append("·" * len(piece) if hidden else piece, style=SPACE_STYLE)
        else:
            body.append(piece, style=style)


def _tokens(count: int) -> str:
    return "1 token" if count == 1 else f"{count} tokens"

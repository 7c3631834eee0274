"""Show a row on a terminal as the trainer sees it: special tokens, white space, truncation, and scored text.

Every colour comes with a mark, so that the output reads the same in a pipe or under NO_COLOR.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.text import Text

from easydel.data.faults import RowFault
from easydel.data.preference.tokenise import Tokenizer
from easydel.data.tree import PAIR_BRANCHES, PreferencePair, PromptTree
from easydel.errors import HIDDEN, visible

SPECIAL_STYLE = "bold magenta"
SPACE_STYLE = "dim cyan"
UNSCORED_STYLE = "dim"
COLOURS = {"prompt": "blue", "chosen": "green", "rejected": "red"}
OTHER_COLOUR = "yellow"
PIECES = re.compile(rf"(\n|\t|\r|{HIDDEN.pattern}|^ +| +$| +(?=\n)| {{2,}})")
LEGEND = "[token] special   ↵ newline   → tab   · space that would not show   «text» read, but not scored"


def render_pair(pair: PreferencePair, tokenizer: Tokenizer) -> RenderableType:
    """Render prompt, chosen and rejected in a box each, with their token counts; scored text is underlined."""
    facts = []
    if pair.weight != 1.0:
        facts.append(f"weight {pair.weight:g}")
    if pair.ref_chosen_logps is not None:
        facts.append(f"given reference log-probs {pair.ref_chosen_logps:g} and {pair.ref_rejected_logps:g} nats")
    return render_tree(pair.tree, tokenizer, PAIR_BRANCHES, facts)


def render_tree(
    tree: PromptTree, tokenizer: Tokenizer, names: Sequence[str] = (), facts: Sequence[str] = ()
) -> RenderableType:
    """Render the prompt and every completion in a box each, with their token counts; scored text is underlined.

    Args:
      tree: the tokenised row.
      tokenizer: the tokenizer that made it.
      names: names of the completions; by default "completion 0" and so on.
      facts: other facts about the row, for the first line.
    """
    names = names or [f"completion {number}" for number in range(len(tree.branches))]
    heading = ", ".join([f"row {tree.index}" if tree.index >= 0 else "one row", *facts])
    boxes = [_box("prompt", tree.prompt_ids, None, tree.prompt_truncated, tokenizer)]
    for name, branch in zip(names, tree.branches, strict=True):
        boxes.append(_box(name, branch.ids, branch.loss_mask, branch.truncated, tokenizer))
    return Group(Text(heading), *boxes, Text(LEGEND, style="dim"))


def render_fault(fault: RowFault, location: str = "") -> RenderableType:
    """Render the reason why a row is not used; `location` says where it lies, such as "train.jsonl, row 812"."""
    body = Text(visible(fault.message))
    if fault.structural:
        body.append("\nThis concerns every row: training would stop before it starts.", style="bold")
    where = visible(location) or f"row {fault.index}"
    return Panel(
        body, title=Text(f"✗ {where}: {fault.reason} ({visible(fault.field)})"), title_align="left", border_style="red"
    )


def _box(name: str, ids: np.ndarray, loss_mask: np.ndarray | None, cut: int, tokenizer: Tokenizer) -> Panel:
    """One run of tokens in a box; `loss_mask` is None for a prompt, which is never scored."""
    colour = COLOURS.get(name, OTHER_COLOUR)
    is_completion = loss_mask is not None
    scored = loss_mask if loss_mask is not None else np.zeros(len(ids), bool)
    title = f"{name}: {_tokens(len(ids))}"
    if is_completion:
        title += f", {int(scored.sum())} scored"
    if cut:
        title += f", {_tokens(cut)} cut off"
    body = Text()
    for text, special, carries_loss in _runs(ids, scored, tokenizer):
        quiet = is_completion and not carries_loss
        style = UNSCORED_STYLE if quiet else f"{colour} underline" if carries_loss else colour
        body.append("«" if quiet else "", style=SPACE_STYLE)
        if special:
            body.append(f"[{visible(text)}]", style=f"{SPECIAL_STYLE} underline" if carries_loss else SPECIAL_STYLE)
        else:
            _append_visibly(body, text, style)
        body.append("»" if quiet else "", style=SPACE_STYLE)
    if cut and is_completion:
        body.append(f" … {_tokens(cut)} cut off", style=SPACE_STYLE)
    if body.plain.endswith("\n"):
        body.right_crop(1)
    return Panel(body, title=Text(title), title_align="left", border_style=colour)


def _runs(ids: np.ndarray, scored: np.ndarray, tokenizer: Tokenizer) -> Iterator[tuple[str, bool, bool]]:
    """Text, whether it is one special token, and whether it is scored; equal neighbours are joined."""
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
    """The text of ids[start:], with the space that some tokenizers only write after other tokens."""
    before, whole = tokenizer.decode(ids[:start]), tokenizer.decode(ids)
    return whole[len(before) :] if start and whole.startswith(before) else tokenizer.decode(ids[start:])


def _append_visibly(body: Text, text: str, style: str) -> None:
    """Append text with its newlines, tabs and hidden characters marked, and spaces where they would not be seen."""
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

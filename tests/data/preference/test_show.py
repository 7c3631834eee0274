"""What a pair looks like in a terminal, with and without colour."""

import io

import numpy as np
import pytest
from rich.console import Console

from easydel.data.faults import RowFault
from easydel.data.preference.show import render_fault, render_pair, render_tree
from easydel.data.preference.transform import PreferenceTransform
from easydel.data.tree import PromptTree

pytestmark = pytest.mark.usefixtures("one_renderer")

ROW = {
    "prompt": [{"role": "user", "content": "Hello [bold]there[/bold].  \tWhat?"}],
    "chosen": [
        {"role": "assistant", "content": "Paris.\nYes."},
        {"role": "user", "content": "Thank you."},
        {"role": "assistant", "content": "I hope this helps!"},
    ],
    "rejected": [{"role": "assistant", "content": "The sea."}],
}


def shown(renderable, **console):
    file = io.StringIO()
    Console(file=file, width=100, **console).print(renderable)
    return file.getvalue()


@pytest.fixture
def pair(chatml):
    return PreferenceTransform(chatml)(ROW, 3)


def test_special_tokens_white_space_and_markup_are_all_visible(pair, chatml):
    plain = shown(render_pair(pair, chatml))
    for mark in ("row 3", "[<|im_start|>]user↵", "[bold]there[/bold].··→", "Paris.↵", "Yes.[<|im_end|>]"):
        assert mark in plain
    assert "\x1b" not in plain


def test_turns_that_carry_no_loss_are_marked_without_colour(pair, chatml):
    plain = shown(render_pair(pair, chatml)).replace("\n", " ")
    inside = [piece.split("»")[0] for piece in plain.split("«")[1:]]
    assert any("Thank you." in piece for piece in inside)
    assert not any("Paris." in piece or "helps!" in piece for piece in inside)


def test_token_counts_are_those_of_the_pair(pair, chatml):
    plain = shown(render_pair(pair, chatml))
    assert f"prompt: {len(pair.prompt_ids)} tokens" in plain
    assert f"chosen: {len(pair.chosen_ids)} tokens, {pair.chosen_loss_mask.sum()} scored" in plain


def test_what_was_cut_is_counted(chatml):
    pair = PreferenceTransform(chatml, max_prompt_length=5, max_completion_length=4)(ROW)
    plain = shown(render_pair(pair, chatml))
    assert f"prompt: 5 tokens, {pair.prompt_truncated} tokens cut off" in plain
    assert f"{pair.chosen_truncated} tokens cut off" in plain and pair.chosen_truncated > 4


def test_scored_text_is_underlined_in_colour(pair, chatml):
    coloured = shown(render_pair(pair, chatml), force_terminal=True, color_system="standard")
    assert "\x1b[4;32mParis." in coloured
    assert "\x1b[2mThank you." in coloured or "\x1b[2muser" in coloured


def test_all_text_of_the_pair_is_there(pair, chatml):
    ids = np.concatenate([pair.prompt_ids, pair.rejected_ids])
    plain = "".join(shown(render_pair(pair, chatml)).split())
    for word in chatml.decode(ids).replace("<|im_start|>", " ").replace("<|im_end|>", " ").split():
        assert word in plain


def test_a_fault_says_where_what_and_how_to_fix_it():
    fault = RowFault(3, "chosen", "empty completion", '"chosen" is [red]empty[/red]. Remove the row.')
    plain = shown(render_fault(fault, "train.jsonl, row 3"))
    for words in ("train.jsonl, row 3", "empty completion", "(chosen)", "[red]empty[/red]"):
        assert words in plain
    assert "row 3" in shown(render_fault(fault))


def test_a_tree_shows_each_of_its_completions(pair, chatml):
    chosen, rejected = pair.tree.branches
    tree = PromptTree(pair.prompt_ids, (chosen, rejected, rejected), index=4)
    plain = shown(render_tree(tree, chatml))
    assert "row 4" in plain and plain.count("The sea.") == 2
    for number, branch in enumerate(tree.branches):
        assert f"completion {number}: {branch.ids.size} tokens, {branch.loss_mask.sum()} scored" in plain

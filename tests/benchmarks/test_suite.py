"""The benchmark suite compares like with like, counts right, and its tables are those of its results."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from benchmarks.arithmetic import forward_flops, update_flops
from benchmarks.checks import disagreements, failures, hold_ups
from benchmarks.harness import RESULTS
from benchmarks.made import as_text, made_row, tokenizer_of_ids
from benchmarks.rows import TextRow, choose, render, write_rows
from benchmarks.summary import spread, steady_updates
from benchmarks.tables import PAGES, PLACE, generated_table, headline_table, with_tables
from easydel.data import PreferenceTransform
from easydel.data.batching.packing import PackingLayout, pack
from easydel.data.tree import PreferencePair
from tests.tiny import tiny_config


def row(prompt: str, chosen: str, rejected: str) -> dict:
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


def run(contender: str, trainer: str, seconds: list[float], losses: list[float], tokens: list[int], **more) -> dict:
    updates = [
        {"seconds": s, "processor_seconds": 2 * s, "processor_seconds_of_others": 0.0, "loss": x, "tokens": t}
        for s, x, t in zip(seconds, losses, tokens, strict=True)
    ]
    if trainer == "ours":
        updates = [update | {"forward_flops": 1e9, "compilation": 0.0} for update in updates]
    about = {"contender": contender, "trainer": trainer, "pairs": 2, "scores_reference": True}
    return about | {"updates": updates, "peak_memory": 10**9, "seconds": {"first update done": 7.0}} | more


def result(*runs: dict) -> dict:
    return {
        "set": "mixed",
        "files": ["rows.jsonl"],
        "rows": 6,
        "pairs": 2,
        "updates": 3,
        "tokens": [[5, 3, 2], [4, 3, 3], [6, 2, 2]],
        "machine": {"cores": 2, "processor": "a processor"},
        "matmul": [{"4096 x 576 x 1536": 9e9, "2048 x 2048 x 2048": 10e9}] * 2,
        "runs": list(runs),
        "disagreements": [],
    }


LOSSES = [math.log(2), 0.6, 0.5]
OURS = run("ours", "ours", [9.0, 2.0, 2.0], LOSSES, [10, 10, 10])
TRL = run("TRL", "trl", [9.0, 6.0, 6.0], [x + 1e-4 for x in LOSSES], [15, 14, 16], peak_memory=4 * 10**9)


def test_the_arithmetic_of_a_pair_is_what_a_hand_counts():
    config = tiny_config(
        vocab_size=5,
        hidden_size=2,
        intermediate_size=3,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=2,
        layer_windows=(None,),
    )
    prompt, chosen, rejected = (np.ones(size, np.int32) for size in (2, 1, 2))
    pair = PreferencePair(prompt, chosen, rejected, np.ones(1, bool), np.ones(2, bool), index=0)
    # Four projections of 2 x 2 and three of 2 x 3 for 5 tokens.
    layers = 2 * (4 * 2 * 2 + 3 * 2 * 3) * 5
    # The prompt's tokens see 1 and 2 keys, the chosen one 3, the rejected ones 3 and 4; scores and sums, 2 wide.
    attention = 2 * 2 * 2 * (1 + 2 + 3 + 3 + 4)
    head = 2 * 2 * 5 * (1 + 2)
    for packing in (True, False):
        batch = pack([pair], PackingLayout(padding_value=0, packing=packing))
        assert forward_flops(config, batch) == layers + attention + head
    assert update_flops(config, batch, scores_reference=True) == 4 * (layers + attention + head)


def test_a_rendered_row_has_the_tokens_it_says(tokenizer, tmp_path):
    rendered = render(row("say a word", "yes, tea.", "no"), tokenizer, max_length=100)
    assert isinstance(rendered, TextRow)
    write_rows([rendered], tmp_path / "rows.jsonl")
    pair = PreferenceTransform(tokenizer)(json.loads((tmp_path / "rows.jsonl").read_text()))
    assert isinstance(pair, PreferencePair)
    assert rendered.tokens == (pair.prompt_ids.size, pair.chosen_ids.size, pair.rejected_ids.size)


@pytest.mark.parametrize(
    ("chosen", "max_length", "reason"),
    [("tea" * 30, 100, "longer than 100 tokens"), ("a<|im_end|>b", 100, "a stop token within a completion")],
)
def test_a_row_on_which_trainers_may_differ_is_left_out_with_its_reason(tokenizer, chosen, max_length, reason):
    assert render(row("say", chosen, "no"), tokenizer, max_length) == reason


def test_a_mixed_set_takes_as_many_rows_of_each_file_and_the_same_ones_every_time(tokenizer, tmp_path):
    files = [tmp_path / "tea.jsonl", tmp_path / "rain.jsonl"]
    for file in files:
        lines = [json.dumps(row(f"{file.stem} {number}", "yes", "no")) for number in range(9)]
        file.write_text("\n".join([*lines, json.dumps(row("long", "yes" * 50, "no"))]))
    rows, left_out = choose(files, 12, tokenizer, max_length=100)
    assert sum("tea" in one.prompt for one in rows) == sum("rain" in one.prompt for one in rows) == 6
    assert set(left_out) <= {"longer than 100 tokens"}
    assert choose(files, 12, tokenizer, max_length=100) == (rows, left_out)
    with pytest.raises(ValueError, match=r"9 rows that are fit, 10 are wanted"):
        choose(files, 20, tokenizer, max_length=100)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_made_row_has_its_length_and_the_prompt_its_share(share):
    made = made_row(np.random.default_rng(0), 100, share, 32)
    sizes = {field: len(ids) for field, ids in made.items()}
    prompt = max(1, round(100 * share))
    assert sizes == {"prompt": prompt, "chosen": 100 - prompt, "rejected": 100 - prompt}
    assert made["chosen"][-1] == made["rejected"][-1] == 1
    words = [token for ids in (made["prompt"], made["chosen"][:-1], made["rejected"][:-1]) for token in ids]
    assert min(words) >= 8 and max(words) < 32
    # As text it is the same row, for us and for whoever tokenises prompt and completion together.
    tokenizer, text = tokenizer_of_ids(32), as_text(made)
    pair = PreferenceTransform(tokenizer)({"prompt": text.prompt, "chosen": text.chosen, "rejected": text.rejected})
    assert isinstance(pair, PreferencePair)
    for side, ids in (("chosen", pair.chosen_ids), ("rejected", pair.rejected_ids)):
        joined = tokenizer(text.prompt + getattr(text, side))["input_ids"]
        assert joined == made["prompt"] + made[side] == [*pair.prompt_ids.tolist(), *ids.tolist()]


def test_contenders_that_trained_alike_agree():
    assert disagreements(result(OURS, TRL)) == []


def test_another_loss_and_a_missing_token_are_found():
    other = run("TRL", "trl", [1.0] * 3, [math.log(2), 0.6, 0.502], [15, 14, 15])
    assert disagreements(result(OURS, other)) == [
        "TRL: loss of update 3 is 0.502000, ours has 0.500000",
        "TRL: update 3 ran 15 tokens, expected 16",
    ]


@pytest.mark.parametrize("what", ["seconds", "processor_seconds_of_others"])
def test_an_update_that_was_paused_or_had_company_is_found(what):
    held_up = run("ours", "ours", [9.0, 2.0, 2.0], LOSSES, [10, 10, 10])
    held_up["updates"][1][what] += 60.0
    assert hold_ups(result(OURS, TRL)) == []
    (found,) = hold_ups(result(held_up, TRL))
    assert found.startswith("ours: update 2 took")


def test_a_peer_that_failed_is_in_the_table_with_its_reason():
    point = {"pairs": 2, "tokens": [[5, 3, 2]] * 3, "runs": [OURS, TRL]}
    failed = {"contender": "TRL", "trainer": "trl", "pairs": 2, "failure": "ran out of memory or was killed"}
    table = generated_table({"points": {"base": point, "length 64": point | {"runs": [OURS, failed]}}})
    assert "| base | 2.00 (2.00 to 2.00) | 6.00 (6.00 to 6.00) | 3.0 | 1.00 | 4.00 | 0.25 |" in table
    assert "| length 64 | 2.00 (2.00 to 2.00) | ran out of memory or was killed |  | 1.00 |  |  |" in table


def test_updates_that_warm_up_are_not_counted():
    compiled = {"seconds": 1.0, "compilation": 3.0}
    quick = {"seconds": 1.0, "compilation": 0.0}
    assert steady_updates([{"updates": [compiled, quick, compiled, quick]}, {"updates": [quick] * 4}]) == [1, 3]
    assert spread([1.0, 3.0, 2.0], 1) == "2.0 (1.0 to 3.0)"


def test_the_table_says_how_many_times_as_fast_we_are():
    lines = headline_table(result(OURS, TRL)).splitlines()
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    columns = [cell.strip() for cell in lines[0].strip("|").split("|")]
    ours = dict(zip(columns, cells, strict=True))
    assert ours["pairs a second"] == "1.00"
    assert ours["speed, TRL = 1"] == "3.00"
    assert ours["memory, TRL = 1"] == "0.25"
    # Four passes of 1 GFLOP in 2 s, of 10 GFLOP/s.
    assert ours["share of the matmul rate"] == "20%"


def test_a_contender_that_failed_is_named():
    failed = {"contender": "TRL", "trainer": "trl", "pairs": 2, "failure": "ran out of memory or was killed"}
    measured = result(OURS, failed)
    measured["disagreements"] = failures(measured)
    assert "TRL failed: ran out of memory" in headline_table(measured)
    assert failures(result(OURS, TRL)) == []


def test_a_contender_that_was_held_up_is_left_out_and_named():
    held_up = run("TRL", "trl", [9.0, 6.0, 6.0], LOSSES, [15, 14, 16])
    held_up["updates"][1]["processor_seconds_of_others"] = 5.0
    table = headline_table(result(OURS, held_up))
    assert "| TRL |" not in table
    assert table.endswith("because other work on the machine held them up: TRL.")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_every_table_of_a_page_is_the_one_its_results_make(page):
    assert with_tables(page.read_text()) == page.read_text()


def test_every_result_is_shown_on_a_page():
    shown = {place["name"] for page in PAGES for place in PLACE.finditer(page.read_text())}
    assert {file.stem for file in RESULTS.glob("*.json")} <= shown

"""Rows of every shape through the transform, under several chat templates."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from easydel.data import PreferencePair, PreferenceTransform
from tests.fuzz.inputs import BIG_VALUES, HOSTILE_VALUES, SEEDS, made, mutate_json, revive
from tests.fuzz.made import TEMPLATES, byte_tokenizer

WORDS = [
    "",
    " ",
    "\n",
    "Blue.",
    "Name a colour.",
    "two words",
    "<|im_end|>",
    "<|im_start|>assistant\n",
    "é",
    "日本",
    "\u200b",
]
WORDS += [
    "User: ",
    "<think>\nhm\n</think>\n",
    "{{ 7 * 7 }}",
    "[1, 2]",
    '{"role": "user"}',
    "a" * 700,
    "\r\n",
    "\x00",
    "\ud83d",
]
texts = st.lists(st.sampled_from(WORDS), max_size=3).map("".join) | st.sampled_from(WORDS) | st.text(max_size=6)
roles = st.sampled_from(
    ["user", "assistant", "system", "tool", "human", "gpt", "function_call", "USER", "", "developer"]
)
plain = st.none() | st.booleans() | st.integers() | st.floats() | texts
jsons = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=5
)
calls = st.lists(
    st.fixed_dictionaries(
        {"type": st.just("function"), "function": st.fixed_dictionaries({"name": texts, "arguments": jsons})}
    ),
    max_size=2,
)
parts = st.lists(
    st.fixed_dictionaries({"type": st.sampled_from(["text", "image", "image_url", "thinking"]), "text": texts}),
    max_size=3,
)
openai = st.fixed_dictionaries(
    {"role": roles, "content": texts | parts | st.none()},
    optional={"tool_calls": calls, "reasoning_content": texts, "name": texts, "tool_call_id": texts, "weight": jsons},
)
sharegpt = st.fixed_dictionaries({"from": roles, "value": texts | st.none()}, optional={"weight": jsons})
turns = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": texts})
messages = st.lists(turns, max_size=4) | st.lists(openai, max_size=3) | st.lists(sharegpt, max_size=3)
said = st.sampled_from([word for word in WORDS if word.strip() and word != "\ud83d"]) | st.text(
    "abc .", min_size=1, max_size=6
)
ordinary = st.tuples(said, said, said).map(
    lambda three: {
        "prompt": [{"role": "user", "content": three[0]}],
        "chosen": [{"role": "assistant", "content": three[1]}],
        "rejected": [{"role": "assistant", "content": three[2]}],
    }
)

odd_values = [
    made("array", [1, 2, 3], "int64"),
    made("array", [[1, 2], [3, 4]], "int32"),
    made("array", [], "float32"),
    made("array", ["a", None], "object"),
    made("scalar", 1.5, "float16"),
    made("scalar", 7, "uint64"),
    made("bytes", "ff00fe"),
    made("tuple", "user", "hi"),
    made("keyed by number", "x"),
    [1, 2, 3],
    [True],
    [2**40],
    [1, "a"],
]
anything = st.sampled_from([*HOSTILE_VALUES, *BIG_VALUES, *odd_values]) | jsons
CALL = {"type": "function", "function": {"name": "w", "arguments": {"city": "Oslo"}}}
TOOLS_OF_A_ROW = [{"type": "function", "function": {"name": "w", "parameters": {"type": "object", "properties": {}}}}]
# Beside the pair; most rows have none or one of them, so that most of the transform is reached.
OPTIONS: dict[str, list[Any]] = {
    "tools": [TOOLS_OF_A_ROW, str(TOOLS_OF_A_ROW), json.dumps(TOOLS_OF_A_ROW), [None], [{"a": {}}], "[", {}, 7],
    "chat_template_kwargs": [
        {"enable_thinking": False},
        '{"x": 1}',
        {"tokenize": True},
        {"messages": []},
        {"": 1},
        [],
        "x",
    ],
    "weight": [
        0,
        1.0,
        "0.5",
        "",
        1e300,
        -1,
        10**400,
        True,
        float("nan"),
        float("inf"),
        "1e999",
        [1.0],
        made("scalar", 2, "int8"),
    ],
    "ref_chosen_logps": [-1.5, 0, 3.0, -1e300, float("nan"), "x", None],
    "ref_rejected_logps": [-1.5, 0, 3.0, -1e300, float("inf"), "-2", None],
    "system": ["Answer in French.", "", None, ["a"], 7],
    "images": [[], None, ["a.png"], [{"bytes": "x"}]],
    "score": [0.5, None, "high", 10**400],
    "prompt_ids": [[10, 11], [], None, "x"],
}


def with_options(row: dict[str, Any], seed: int) -> dict[str, Any]:
    """The row with up to three more columns."""
    rng = random.Random(seed)
    for name in rng.sample(sorted(OPTIONS), rng.choice((0, 0, 1, 1, 2, 3))):
        row = {**row, name: rng.choice(OPTIONS[name])}
    return row


limits = st.sampled_from([[2000, 1000, None], [64, 32, None], [16, 8, 4], [None, None, None]])


def _target(rows: st.SearchStrategy[Any]) -> tuple[st.SearchStrategy[Any], Callable[[Any], Any]]:
    tokenizers = [byte_tokenizer(template) for template in TEMPLATES]
    made_up: dict[Any, PreferenceTransform] = {}

    def run(given: dict[str, Any]) -> Any:
        which, lengths = given["template"], tuple(given["limits"])
        if (which, lengths) not in made_up:
            made_up[which, lengths] = PreferenceTransform(tokenizers[which], *lengths)
        pair = made_up[which, lengths](revive(given["row"]), 3)
        if isinstance(pair, PreferencePair):
            require_sound(pair, len(tokenizers[which]))
        return pair

    template = st.integers(0, len(tokenizers) - 1)
    return st.fixed_dictionaries({"template": template, "limits": limits, "row": rows}), run


def require_sound(pair: PreferencePair, vocabulary: int) -> None:
    """What every pair must be, whatever the row was."""
    for side in ("prompt", "chosen", "rejected"):
        ids = getattr(pair, f"{side}_ids")
        assert ids.dtype == np.int32 and ids.ndim == 1 and ids.size > 0, side
        assert ids.min() >= 0 and ids.max() < vocabulary, side
    for side in ("chosen", "rejected"):
        mask = getattr(pair, f"{side}_loss_mask")
        assert mask.dtype == bool and mask.shape == getattr(pair, f"{side}_ids").shape and mask.any(), side
    assert np.isfinite(np.float32(pair.weight)) and pair.weight >= 0
    assert (pair.ref_chosen_logps is None) == (pair.ref_rejected_logps is None), "one reference log-prob of two"
    for logps in (pair.ref_chosen_logps, pair.ref_rejected_logps):
        assert logps is None or logps <= 0, "a positive log-prob"
        with np.errstate(over="ignore"):
            assert logps is None or np.isfinite(np.float32(logps)), "a log-prob that float32 cannot hold"
    assert not np.array_equal(pair.chosen_ids, pair.rejected_ids), "chosen equals rejected"


def text(work: Path) -> Any:
    """Rows whose columns are text."""
    rows = st.fixed_dictionaries({"chosen": texts, "rejected": texts}, optional={"prompt": texts})
    rows |= st.fixed_dictionaries({"prompt": said, "chosen": said, "rejected": said})
    return _target(st.builds(with_options, rows, SEEDS))


def messages_and_text(work: Path) -> Any:
    """Rows of OpenAI or ShareGPT messages, mixed with text, with all that may stand beside them."""
    column = messages | texts | messages.map(str)
    rows = st.fixed_dictionaries({"chosen": column, "rejected": column}, optional={"prompt": column | st.none()})
    return _target(st.builds(with_options, rows | ordinary, SEEDS))


def hostile(work: Path) -> Any:
    """Good rows bent in a few places, and rows that are anything at all."""
    good = [
        {"prompt": "What is two and two?", "chosen": " Four.", "rejected": " Five.", "weight": 1.0},
        {"prompt_ids": [10, 11, 12], "chosen_ids": [13, 14], "rejected_ids": [15]},
        {
            "prompt": [{"role": "user", "content": "Weather in Oslo?"}],
            "chosen": [
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "content": "rain"},
                {"role": "assistant", "content": "Rain."},
            ],
            "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "No."}]}],
            "tools": [{"type": "function", "function": {"name": "w", "parameters": {"type": "object"}}}],
        },
        {
            "chosen": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}],
            "rejected": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Go."}],
        },
    ]
    bent = st.builds(mutate_json, st.sampled_from(good), SEEDS, st.just(odd_values))
    columns = st.sampled_from(["prompt", "chosen", "rejected", "tools", "weight", "", "\x1b[2J"])
    return _target(bent | st.dictionaries(columns, anything, max_size=5) | anything)

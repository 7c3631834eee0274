"""What may be written for a value of each type."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from easydel.option_types import WrongType, option_type

Optimizer = Literal["adamw", "lion"]


@pytest.mark.parametrize(
    ("annotation", "given", "expected"),
    [
        (float, "1e-6", 1e-6),  # YAML 1.1 takes 1e-6 for text
        (float, 1, 1.0),
        (float | None, "0.5", 0.5),
        (int, "12", 12),
        (int | None, "none", None),
        (int | None, "None", None),
        (int | None, None, None),
        (str | None, "null", None),
        (bool, "False", False),
        (bool | None, True, True),
        (Optimizer, "lion", "lion"),
        (tuple[Optimizer, ...], "lion", ("lion",)),
        (tuple[int, int], ["1", "-1"], (1, -1)),
        (str | list[str], "sigmoid", "sigmoid"),
        (str | list[str], "[ab].jsonl", "[ab].jsonl"),
        (str | list[str], ["sigmoid", "sft"], ["sigmoid", "sft"]),
        (list[float] | None, "[1, 2e-1]", [1.0, 0.2]),
        (dict[str, Any], {"eps": "1e-8", "nesterov": True}, {"eps": 1e-8, "nesterov": True}),
        (dict[str, Any] | None, "{deep: {lr: 1e-3}}", {"deep": {"lr": 1e-3}}),
        (list[Any] | None, [{"name": "search"}], [{"name": "search"}]),
    ],
)
def test_a_value_is_read_as_it_was_meant(annotation, given, expected):
    value = option_type(annotation).read(given)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("annotation", "given", "in_words"),
    [
        (float, "many", "a number"),
        (float, True, "a number"),
        (int, 2.5, "a whole number"),
        (int, True, "a whole number"),
        (int, None, "a whole number"),
        (int | None, "2.5", "a whole number or none"),
        (bool, 1, "true or false"),
        (bool, "maybe", "true or false"),
        (str, 2024, "text"),
        (Optimizer, "sgd", "one of adamw, lion"),
        (tuple[int, int, int], [1, 2], "3 values, each a whole number"),
        (list[float], ["a"], "a list, each a number"),
        (dict[str, Any], "b1", "a mapping from names to values"),
        (dict[str, Any], "{b1: ", "a mapping from names to values"),
    ],
)
def test_a_value_of_another_type_is_refused_in_words(annotation, given, in_words):
    with pytest.raises(WrongType, match=f"^{in_words}$"):
        option_type(annotation).read(given)
    assert option_type(annotation).in_words == in_words

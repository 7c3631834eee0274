"""Options as fields: their ranges in words and in force, and what a command lists of them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from easydel.options import COUNT, INDEX, POSITIVE, Range, check_options, option_field, own_options

SHARE = Range("a share", least=0, below=1)


@dataclasses.dataclass
class Options:
    rank: int | None = option_field(None, changes="result", within=COUNT)
    """Rank of the adapters."""
    rate: float = option_field(1e-6, changes="result", within=POSITIVE)
    """Learning rate."""
    dropped: float = option_field(0.0, changes="session", within=SHARE, help="Share that is left out.")
    names: list[str] = option_field(factory=list, changes="session")
    """Names."""


@pytest.mark.parametrize(
    ("given", "in_words", "inside", "outside"),
    [
        (COUNT, "a whole number of at least 1", [1, 2**31], [0, -1]),
        (INDEX, "a whole number of at least 0", [0], [-1]),
        (POSITIVE, "a number above 0", [1e-30], [0, -1.0]),
        (SHARE, "a share from 0 to below 1", [0, 0.999], [1, -0.1]),
        (Range("a share", least=0, most=1), "a share from 0 to 1", [0, 1], [1.1, -0.1]),
        (Range("a share", above=0, most=1), "a share above 0 and up to 1", [0.1, 1], [0, 1.1]),
    ],
)
def test_a_range_says_what_it_holds(given, in_words, inside, outside):
    assert str(given) == in_words
    assert all(value in given for value in inside)
    assert not any(value in given for value in outside)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "rank=0, expected None or a whole number of at least 1."),
        ({"rank": 1.5}, "rank=1.5, expected a whole number of at most 32 bits or None."),
        ({"rate": 0.0}, "rate=0.0, expected a number above 0."),
        ({"rate": float("nan")}, "rate=nan, expected a finite number that float32 holds."),
        ({"dropped": 1}, "dropped=1, expected a share from 0 to below 1."),
        ({"names": "a"}, "names='a', expected a list of text."),
    ],
)
def test_a_value_of_another_type_or_out_of_range_is_refused(changes, message):
    with pytest.raises(ValueError) as refused:
        check_options(Options(**changes))
    assert str(refused.value) == message


def test_a_numpy_number_becomes_the_number_it_is():
    options = Options(rank=np.int64(4), rate=np.float64(0.5))
    check_options(options)
    assert (type(options.rank), type(options.rate)) == (int, float)


def test_a_command_lists_every_field_with_its_help():
    listed = {option.flag: (option.default, option.metavar, option.help) for option in own_options(Options)}
    assert listed == {
        "--rank": (None, "INT", "Rank of the adapters."),
        "--rate": (1e-6, "FLOAT", "Learning rate."),
        "--dropped": (0.0, "FLOAT", "Share that is left out."),
        "--names": ([], "TEXT", "Names."),
    }

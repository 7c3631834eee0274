"""A mixture keeps its proportions, repeats no row, and ends where a row is due that is not there."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from easydel.data.batching.loader import PreferenceLoader
from easydel.data.faults import DataError
from easydel.data.sources.base import ShardedDataSource
from easydel.data.sources.files import JsonLinesSource
from easydel.data.sources.mixture import MixtureSource
from easydel.data.sources.open_source import open_source
from tests.data.batching.test_loader import Numbers, collate, transform


class Tagged(Numbers):
    """Rows that say which source they are from."""

    def __init__(self, tag, *sizes, by_number=True):
        super().__init__(*sizes, by_number=by_number)
        self._tag = tag

    def _row(self, name, number):
        return super()._row(name, number) | {"source": self._tag}


def mixture(sizes, weights, by_number=True):
    sources = [Tagged(tag, size, by_number=by_number) for tag, size in enumerate(sizes)]
    return MixtureSource(sources, weights)


SIZES = st.lists(st.integers(0, 60), min_size=3, max_size=3)
WEIGHTS = st.lists(st.sampled_from([0.1, 0.25, 0.3, 0.5, 0.7, 1, 2, 3.5, 7]), min_size=3, max_size=3)


@given(SIZES, WEIGHTS)
def test_proportions_hold_after_every_row_until_a_source_that_is_due_is_empty(sizes, weights):
    source = mixture(sizes, weights)
    rows = [source[n] for n in range(len(source))]
    taken = [0, 0, 0]
    for number, row in enumerate(rows, start=1):
        assert row["n"] == taken[row["source"]]  # each source in its order, none of its rows twice
        taken[row["source"]] += 1
        for count, weight in zip(taken, weights):
            assert abs(count - number * weight / sum(weights)) <= 2
    assert tuple(taken) == source.rows_used
    # One more row would have to come from a source that has no more.
    due, row = source.origin(len(rows))
    assert row == sizes[due]


@given(SIZES, WEIGHTS, st.integers(0, 70))
def test_reading_in_order_gives_the_same_rows_from_any_place_on(sizes, weights, start):
    source, stream = mixture(sizes, weights), mixture(sizes, weights, by_number=False)
    expected = [source[n] for n in range(len(source))]
    assert list(source) == list(stream) == expected
    start = min(start, len(expected))
    assert list(source.open_shard_at_row("mixture", start)) == expected[start:]
    assert list(stream.open_shard_at_row("mixture", start)) == expected[start:]


def test_the_rows_used_of_each_source_can_be_told():
    # After 7 000 and 3 000 rows, one more of the first source comes before one of the second is due.
    assert mixture([10_000, 3_000], [0.7, 0.3]).rows_used == (7_001, 3_000)
    assert mixture([10, 1000], [1, 1]).rows_used == (10, 10)
    # Proportions that no short pattern holds exactly are kept to 1 in 10 000.
    used = mixture([10**6, 10**6], [0.333_333_3, 0.666_666_7]).rows_used
    assert used[0] / sum(used) == pytest.approx(1 / 3, abs=1e-4)


def test_a_mixture_has_random_access_where_all_its_sources_have_it():
    assert mixture([3, 3], [1, 1]).has_random_access
    mixed = MixtureSource([Numbers(3), Numbers(3, by_number=False)], [1, 1])
    assert not mixed.has_random_access
    assert len(list(mixed)) == 6
    with pytest.raises(TypeError):
        len(mixed)
    with pytest.raises(TypeError):
        _ = mixed.rows_used


def test_sources_in_shards_and_mixtures_of_mixtures_are_read_through():
    inner = MixtureSource([Numbers(2, 3), Numbers(5)], [1, 1])
    outer = MixtureSource([inner, Numbers(100)], [1, 1])
    rows = [outer[n]["n"] for n in range(len(outer))]
    assert rows[::2] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert rows[1::2] == list(range(10))
    assert rows == [row["n"] for row in outer]
    assert [row["n"] for row in outer.open_shard_at_row("mixture", 7)] == rows[7:]


@pytest.mark.parametrize("compressed", [False, True])
def test_a_row_is_located_in_its_own_file(tmp_path, compressed):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"n": n}) + "\n" for n in range(9)))
    source: ShardedDataSource = open_source(tmp_path / "b.jsonl")
    if compressed:
        source = source.filter(lambda row: True)
    mixed = MixtureSource([JsonLinesSource(tmp_path / "a.jsonl"), source], [2, 1])
    rows = list(mixed)
    loader = PreferenceLoader(mixed, transform, collate, batch_size=4, max_dropped_share=0.5)
    list(loader)
    examples = loader.tally.state()["examples"]["empty completion"]
    assert [example.split(":")[0].replace(" (filtered or transformed)", "") for example in examples] == [
        "a.jsonl, row 3",
        "b.jsonl, row 3",
    ]
    assert len(rows) == 14


@pytest.mark.parametrize("compressed", [False, True])
def test_a_row_that_cannot_be_read_ends_no_mixture(tmp_path, compressed):
    (tmp_path / "a.jsonl").write_text('{"n": 0}\nnot JSON\n{"n": 2}\n{"n": 4}\n')
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"n": n}) + "\n" for n in range(10, 15)))
    sources = [open_source(tmp_path / name) for name in ("a.jsonl", "b.jsonl")]
    if compressed:
        sources[0] = sources[0].filter(lambda row: True)
    loader = PreferenceLoader(MixtureSource(sources, [1, 1]), transform, collate, batch_size=4, max_dropped_share=0.5)
    assert [n for batch in loader for n in batch["n"].tolist()] == [0, 11, 2, 12, 4, 13]
    assert loader.tally.dropped == {"empty completion": 1, "unreadable row": 1}
    assert "a.jsonl" in loader.tally.summary()


@pytest.mark.parametrize(
    ("count", "weights", "words"),
    [
        (2, [1.0], "2 sources has 1 weights"),
        (0, [], "at least one source"),
        (1, [0.0], "0.0 is the weight"),
        (1, [-1.0], "-1.0"),
        (1, [float("nan")], "nan"),
        (1, [float("inf")], "inf"),
    ],
)
def test_weights_that_say_nothing_are_refused(count, weights, words):
    with pytest.raises(ValueError, match=words):
        MixtureSource([Numbers(3)] * count, weights)


def test_a_mixture_with_an_empty_source_has_no_rows():
    loader = PreferenceLoader(
        mixture([5, 0], [1, 1]).filter(lambda row: row["source"] == 1),
        transform, collate, batch_size=4, max_dropped_share=0.5,
    )  # fmt: skip
    with pytest.raises(DataError, match="holds no rows"):
        list(loader)

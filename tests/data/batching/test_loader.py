"""The loader gives every good row once an epoch, in a reproducible order, and resumes from any position."""

import gzip
import itertools
import json
import time

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from easydel.data.batching.first_rows import check_first_rows
from easydel.data.batching.loader import PreferenceLoader
from easydel.data.faults import DataError, RowFault
from easydel.data.sources.base import ShardedDataSource
from easydel.data.sources.huggingface import HuggingFaceSource
from easydel.data.sources.open_source import open_source
from easydel.data.tree import PreferencePair


class Numbers(ShardedDataSource):
    """Rows {"n": 0}, {"n": 1}, … in shards of the given sizes, by number or in order only."""

    def __init__(self, *sizes, by_number=True):
        self._starts = dict(zip(map(str, range(len(sizes))), itertools.accumulate(sizes, initial=0)))
        self._sizes = dict(zip(self._starts, sizes))
        self._by_number = by_number
        self.opened = []

    @property
    def shard_names(self):
        return tuple(self._sizes)

    def open_shard(self, name):
        return self.open_shard_at_row(name, 0)

    def open_shard_at_row(self, name, row):
        self.opened.append((name, row))
        return (self._row(name, number) for number in range(row, self._sizes[name]))

    def shard_length(self, name):
        return self._sizes[name] if self._by_number else None

    def read_row(self, name, row):
        return self._row(name, row)

    @property
    def has_random_access(self):
        return self._by_number

    def _row(self, name, number):
        return {"n": self._starts[name] + number}


def transform(row, index):
    """Every seventh row is bad."""
    if row["n"] % 7 == 3:
        return RowFault(index, "chosen", "empty completion", f"{row['n']} is bad.")
    ids = np.full(row["n"] % 5 + 1, row["n"], np.int32)
    return PreferencePair(ids, ids, ids, ids >= 0, ids >= 0, index=index)


def collate(pairs):
    return {"n": np.array([pair.prompt_ids[0] for pair in pairs]), "index": np.array([pair.index for pair in pairs])}


GOOD = [n for n in range(40) if n % 7 != 3]
BAD = 40 - len(GOOD)
MODES = {
    "in order": {},
    "shuffled": {"shuffle_seed": 5},
    "stream": {"by_number": False},
    "shuffled stream": {"by_number": False, "shuffle_seed": 5, "shuffle_buffer_size": 11},
    "stream shuffled whole": {"by_number": False, "shuffle_seed": 5},
}


def numbers(by_number=True):
    return Numbers(15, 5, 20, by_number=by_number)


def make(mode, source=None, **options):
    options = {"batch_size": 4, "max_dropped_share": 0.5, "num_epochs": 3} | MODES[mode] | options
    by_number = options.pop("by_number", True)
    source = numbers(by_number) if source is None else source
    return PreferenceLoader(source, transform, collate, **options)


def rows(batches):
    return [n for batch in batches for n in batch["n"].tolist()]


@pytest.fixture(params=MODES)
def mode(request):
    return request.param


def test_every_good_row_comes_once_an_epoch(mode):
    loader = make(mode)
    order = rows(loader)
    epochs = [order[start : start + len(GOOD)] for start in range(0, len(order), len(GOOD))]
    assert [sorted(epoch) for epoch in epochs] == [GOOD] * 3
    if "shuffled" not in mode:
        assert epochs == [GOOD] * 3
    else:
        assert len({tuple(epoch) for epoch in [GOOD, *epochs]}) == 4
    assert loader.counters() == {"dropped_rows": BAD}
    assert loader.tally.rows_seen == 40


def test_the_order_is_the_seeds(mode):
    assert rows(make(mode)) == rows(make(mode))
    if "shuffled" in mode:
        assert rows(make(mode)) != rows(make(mode, shuffle_seed=6))


def test_batches_are_consecutive_rows_and_only_the_last_is_smaller(mode):
    sizes = [len(batch["n"]) for batch in make(mode, batch_size=16)]
    assert sizes == [16] * (3 * len(GOOD) // 16) + [3 * len(GOOD) % 16]


def test_iteration_goes_on_from_every_batch_bit_for_bit(mode):
    loader = make(mode, num_epochs=2)
    whole, positions, dropped = [], [], []
    batches = loader.iterate()
    positions.append(batches.position())
    dropped.append(0.0)
    for batch in batches:
        whole.append(batch)
        positions.append(json.loads(json.dumps(batches.position())))
        dropped.append(loader.counters()["dropped_rows"])
    for place, position in enumerate(positions):
        fresh = make(mode, num_epochs=2)
        rest = fresh.iterate(position)
        assert fresh.counters()["dropped_rows"] == dropped[place]
        for expected, dropped_then in zip(whole[place:], dropped[place + 1 :], strict=True):
            batch = next(rest)
            for key, value in expected.items():
                np.testing.assert_array_equal(batch[key], value)
            # What runs ahead is not counted, so the log of a resumed run is that of an unbroken one.
            assert fresh.counters()["dropped_rows"] == dropped_then
        assert next(rest, None) is None
        assert fresh.tally.summary() == loader.tally.summary()


def test_a_position_does_not_move_with_its_iterator(mode):
    batches = make(mode).iterate()
    next(batches)
    position = batches.position()
    before = json.dumps(position)
    list(batches)
    assert json.dumps(position) == before


@pytest.mark.parametrize(
    ("options", "words"), [({"shuffle_seed": 6}, "shuffle_seed=5, now 6"), ({"shuffle_seed": None}, "now None")]
)
def test_a_position_of_another_order_is_refused(options, words):
    batches = make("shuffled").iterate()
    next(batches)
    with pytest.raises(ValueError, match=words):
        make("shuffled", **options).iterate(batches.position())


def test_a_closed_iterator_gives_no_more(mode):
    batches = make(mode).iterate()
    next(batches)
    batches.close()
    assert next(batches, None) is None


def test_nothing_is_read_before_iteration_asks_for_it(mode):
    seen = []

    def remember(row, index):
        seen.append(index)
        return transform(row, index)

    options = {"batch_size": 4, "max_dropped_share": 0.5} | MODES[mode]
    source = Numbers(1000, by_number=options.pop("by_number", True))
    loader = PreferenceLoader(source, remember, collate, **options)
    batches = iter(loader)
    assert not seen
    next(batches)
    batches.close()
    assert len(seen) < 60


def test_too_many_bad_rows_stop_the_iteration(mode):
    loader = make(mode, max_dropped_share=0.1)
    with pytest.raises(DataError, match="over the limit of 10 %"):
        list(loader)


@pytest.mark.parametrize("sizes", [(), (0,), (0, 0)])
@pytest.mark.parametrize("by_number", [True, False])
@pytest.mark.parametrize("seed", [None, 5])
def test_data_without_rows_is_refused(sizes, by_number, seed):
    source = Numbers(*sizes, by_number=by_number)
    loader = PreferenceLoader(source, transform, collate, batch_size=4, max_dropped_share=0.5, shuffle_seed=seed)
    with pytest.raises(DataError, match="holds no rows"):
        list(loader)


# Streams


def test_a_stream_goes_on_by_opening_a_shard_at_a_row():
    batches = make("stream").iterate()
    for _ in range(4):
        next(batches)
    source = numbers(by_number=False)
    next(make("stream", source).iterate(batches.position()))
    # Sixteen good rows are the first nineteen: four of the second shard.
    assert source.opened[0] == ("1", 4)


def test_a_shuffled_stream_goes_on_by_reading_its_window_again():
    whole, rest = numbers(by_number=False), numbers(by_number=False)
    batches = make("shuffled stream", whole).iterate()
    for _ in range(12):
        next(batches)
    next(make("shuffled stream", rest).iterate(batches.position()))
    assert len(rest.opened) < len(whole.opened)


def test_shards_change_places_and_rows_stay_in_their_window():
    loader = make("shuffled stream", num_epochs=8)
    order = rows(loader)
    last_windows = set()
    for start in range(0, len(order), len(GOOD)):
        last_shard = (order[start + len(GOOD) - 1] >= 15) + (order[start + len(GOOD) - 1] >= 20)
        last_windows.add(last_shard)
    assert last_windows == {0, 1, 2}
    single = PreferenceLoader(
        Numbers(40, by_number=False), transform, collate, batch_size=4, max_dropped_share=0.5, shuffle_seed=5,
        shuffle_buffer_size=10,
    )  # fmt: skip
    order = rows(single)
    assert [n // 10 for n in order] == sorted(n // 10 for n in GOOD) and order != GOOD


def test_a_bad_row_of_a_stream_is_located_by_shard_and_row():
    class Labelled(Numbers):
        def label(self, name):
            return f"part-{name}.jsonl.gz"

    for seed in (None, 5):
        source = Labelled(15, 25, by_number=False)
        loader = PreferenceLoader(
            source, transform, collate, batch_size=4, max_dropped_share=0.5, shuffle_seed=seed, shuffle_buffer_size=100
        )
        list(loader)
        examples = loader.tally.state()["examples"]["empty completion"]
        for example in examples:
            number = int(example.split(": ")[1].split()[0])
            shard, row = (0, number) if number < 15 else (1, number - 15)
            assert example == f"part-{shard}.jsonl.gz, row {row}: {number} is bad."


def test_rows_of_a_stream_that_cannot_be_read_are_counted_and_those_after_them_are_kept(tmp_path):
    lines = [json.dumps({"n": n}) if n % 10 != 5 else "not JSON" for n in range(40)]
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write("\n".join(lines))
    options = {"batch_size": 4, "max_dropped_share": 0.5}
    for source in (open_source(tmp_path / "a.jsonl.gz"), open_source(tmp_path / "a.jsonl.gz").map(lambda row: row)):
        loader = PreferenceLoader(source, transform, collate, **options)
        assert rows(loader) == [n for n in GOOD if n % 10 != 5]
        assert [pair.index for pair in loader.first_pairs(8)] == [n for n in GOOD if n % 10 != 5][:8]
        assert loader.tally.dropped["unreadable row"] == 4
        assert "a.jsonl.gz, row 5: a.jsonl.gz, line 6 is not JSON" in loader.tally.summary()
    # A generator that sees the error is over, so nothing may be read past it.
    generated = source.transform(lambda rows: (row for row in rows))
    with pytest.raises(DataError, match="line 6 is not JSON"):
        list(PreferenceLoader(generated, transform, collate, **options))


@pytest.mark.parametrize("seed", [None, 5])
def test_a_hugging_face_stream_goes_on_from_every_batch(seed):
    def make():
        stream = datasets.Dataset.from_list([{"n": n} for n in range(40)]).to_iterable_dataset(num_shards=3)
        return PreferenceLoader(
            HuggingFaceSource(stream), transform, collate, batch_size=4, max_dropped_share=0.5, shuffle_seed=seed,
            shuffle_buffer_size=9, num_epochs=2,
        )  # fmt: skip

    batches = make().iterate()
    order, places = [], []
    for batch in batches:
        order += batch["n"].tolist()
        places.append((len(order), batches.position()))
    assert sorted(order) == sorted(GOOD * 2)
    assert all(rows(make().iterate(position)) == order[taken:] for taken, position in places)
    # Without a window across epochs, every row comes once in each.
    assert sorted(order[: len(GOOD)]) == GOOD


def test_looking_at_the_first_rows_of_a_stream_takes_none_of_them():
    source = Numbers(40, by_number=False)
    check_first_rows(source, transform, 0.5)
    assert rows(PreferenceLoader(source, transform, collate, batch_size=4, max_dropped_share=0.5)) == GOOD


def test_the_threads_of_a_stream_keep_its_order_and_their_errors_arrive():
    def slow(row, index):
        time.sleep(0.002 * (index % 3))
        if row["n"] == 30:
            raise RuntimeError("row 30")
        return transform(row, index)

    loader = PreferenceLoader(Numbers(40, by_number=False), slow, collate, batch_size=4, max_dropped_share=0.5)
    taken = []
    with pytest.raises(RuntimeError, match="row 30"):
        for batch in loader:
            taken += batch["n"].tolist()
    assert taken == [n for n in GOOD if n < 28]


@pytest.mark.parametrize("by_number", [True, False])
def test_an_error_of_a_source_of_ones_own_goes_through_and_names_the_row(by_number):
    class Broken(Numbers):
        def _row(self, name, number):
            if (name, number) == ("1", 3):
                raise LookupError("the database is gone")
            return super()._row(name, number)

    source = Broken(15, 5, 20, by_number=by_number)
    loader = PreferenceLoader(source, transform, collate, batch_size=4, max_dropped_share=0.5)
    with pytest.raises(LookupError, match="the database is gone") as caught:
        list(loader)
    assert "while reading 1, row 3" in caught.value.__notes__


@pytest.mark.parametrize("by_number", [True, False])
def test_rows_that_are_not_utf_8_are_counted_and_the_others_are_trained_on(tmp_path, by_number):
    texts = pa.array([str(n).encode() if n % 10 else b"caf\xe9" for n in range(1, 41)]).view(pa.string())
    pa.parquet.write_table(pa.table({"n": range(1, 41), "text": texts}), tmp_path / "a.parquet")
    source = open_source(tmp_path / "a.parquet")
    loader = PreferenceLoader(
        source if by_number else source.filter(lambda row: True), transform, collate, batch_size=4,
        max_dropped_share=0.5,
    )  # fmt: skip
    assert rows(loader) == [n for n in range(1, 41) if n % 7 != 3 and n % 10]
    assert loader.tally.dropped["unreadable row"] == 4
    assert 'a.parquet, row 9: column "text" holds text that is not UTF-8' in loader.tally.summary()

"""The loader gives every good row once an epoch, in a reproducible order, and goes on from any place."""

import itertools
import json

import numpy as np
import pytest

from easydel.data.faults import DataError, RowFault
from easydel.data.loader import PreferenceLoader
from easydel.data.preference import PreferencePair
from easydel.data.sources import ShardedDataSource


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
}


def make(mode, **options):
    options = {"batch_size": 4, "max_dropped_share": 0.5, "num_epochs": 3} | MODES[mode] | options
    return PreferenceLoader(Numbers(15, 25), transform, collate, **options)


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
    if mode == "in order":
        assert epochs == [GOOD] * 3
    else:
        assert len({tuple(epoch) for epoch in [GOOD, *epochs]}) == 4
    assert loader.counters() == {"dropped_rows": BAD}
    assert loader.tally.rows_seen == 40


def test_the_order_is_the_seeds(mode):
    assert rows(make(mode)) == rows(make(mode))
    if mode != "in order":
        assert rows(make(mode)) != rows(make(mode, shuffle_seed=6))


def test_batches_are_consecutive_rows_and_only_the_last_is_smaller(mode):
    sizes = [len(batch["n"]) for batch in make(mode, batch_size=16)]
    assert sizes == [16] * (3 * len(GOOD) // 16) + [3 * len(GOOD) % 16]


def test_iteration_goes_on_from_every_batch_bit_for_bit(mode):
    loader = make(mode)
    whole, positions, dropped = [], [], []
    batches = loader.iterate()
    positions.append(batches.position())
    dropped.append(0.0)
    for batch in batches:
        whole.append(batch)
        positions.append(json.loads(json.dumps(batches.position())))
        dropped.append(loader.counters()["dropped_rows"])
    for place, position in enumerate(positions):
        fresh = make(mode)
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

    loader = PreferenceLoader(Numbers(1000), remember, collate, batch_size=4, max_dropped_share=0.5, **MODES[mode])
    batches = iter(loader)
    assert not seen
    next(batches)
    batches.close()
    assert len(seen) < 60


def test_too_many_bad_rows_stop_the_iteration(mode):
    loader = make(mode, max_dropped_share=0.1)
    with pytest.raises(DataError, match="over the limit of 10 %"):
        list(loader)


def test_data_without_rows_is_refused():
    loader = PreferenceLoader(Numbers(), transform, collate, batch_size=4, max_dropped_share=0.5)
    with pytest.raises(DataError, match="holds no rows"):
        list(loader)

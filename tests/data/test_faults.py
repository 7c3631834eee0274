"""The tally counts dropped rows, explains them, and stops the run in time."""

import json

import pytest

from easydel.data.faults import DataError, FaultTally, RowFault

EMPTY = RowFault(812, "rejected", "empty completion", '"rejected" is empty after the chat template.')
EQUAL = RowFault(5, "rejected", "chosen equals rejected", '"chosen" and "rejected" are the same.')
NO_COLUMN = RowFault(0, "prompt", "missing column", 'there is no column "prompt".', structural=True)


def tally_of(good, *faults, limit=0.05):
    tally = FaultTally(limit)
    for _ in range(good):
        tally.record_good()
    for fault in faults:
        tally.record(fault, f"train.jsonl, row {fault.index}")
    return tally


def test_the_summary_names_the_row_the_cause_and_the_share():
    summary = tally_of(1201, EMPTY, EMPTY, EMPTY).summary()
    assert summary.startswith(
        'train.jsonl, row 812: "rejected" is empty after the chat template. '
        "3 of 1 204 rows were dropped for this reason (empty completion; 0.2 %, limit 5 %)."
    )


def test_reasons_are_counted_apart_and_the_most_frequent_comes_first():
    tally = tally_of(1000, EQUAL, EMPTY, EMPTY)
    assert list(tally.dropped.items()) == [("empty completion", 2), ("chosen equals rejected", 1)]
    assert tally.rows_seen == 1003
    assert tally.summary().index("empty completion") < tally.summary().index("chosen equals rejected")


def test_a_clean_run_says_so():
    assert tally_of(3).summary() == "No rows were dropped (3 seen)."


def test_too_many_dropped_rows_stop_the_run_once_enough_were_seen():
    tally = tally_of(94, *[EMPTY] * 5)
    with pytest.raises(DataError, match="6 of 100 rows cannot be used, over the limit of 5 %"):
        tally.record(EMPTY, "train.jsonl, row 1")


def test_a_share_at_the_limit_is_accepted():
    tally_of(95, *[EMPTY] * 5).check(final=True)


def test_few_rows_are_judged_only_at_the_end():
    tally = tally_of(9, EMPTY)
    tally.check()
    with pytest.raises(DataError, match="1 of 10 rows"):
        tally.check(final=True)


def test_data_without_one_good_row_is_refused_whatever_the_limit():
    with pytest.raises(DataError):
        tally_of(0, EMPTY, limit=1.0).check(final=True)


def test_a_structural_fault_stops_at_once_unless_other_rows_are_good():
    with pytest.raises(DataError, match="row 0: there is no column"):
        tally_of(0, NO_COLUMN)
    assert tally_of(1000, NO_COLUMN).dropped == {"missing column": 1}


@pytest.mark.parametrize("limit", [-0.1, 1.5, 5])
def test_a_limit_that_is_no_share_is_refused(limit):
    with pytest.raises(ValueError, match="share"):
        FaultTally(limit)


def test_a_row_counts_once_however_often_it_comes_by():
    tally = FaultTally(limit=0.5)
    for epoch in range(3):
        tally.record_good(epoch)
        tally.record(EMPTY, "train.jsonl, row 812", epoch)
    assert tally.rows_seen == 2
    assert tally.dropped == {"empty completion": 1}


def test_where_epochs_differ_the_largest_count_stands():
    tally = FaultTally(limit=1.0)
    for epoch, bad_rows in enumerate([1, 3, 2]):
        tally.record_good(epoch)
        for row in range(bad_rows):
            tally.record(EMPTY, f"train.jsonl, row {row}", epoch)
    assert tally.dropped == {"empty completion": 3}


@pytest.mark.parametrize("stop", range(1, 9))
def test_counting_goes_on_from_a_state_in_json(stop):
    def count(tally, rows):
        for row in rows:
            epoch, row = divmod(row, 4)
            if row == 2:
                tally.record(EMPTY, "train.jsonl, row 2", epoch)
            else:
                tally.record_good(epoch)

    whole, start, rest = (FaultTally(1.0) for _ in range(3))
    count(whole, range(9))
    count(start, range(stop))
    rest.restore(json.loads(json.dumps(start.state())))
    count(rest, range(stop, 9))
    assert rest.summary() == whole.summary() and rest.rows_seen == 4

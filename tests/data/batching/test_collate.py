"""Collators are values: they can be compared, pickled, and run in worker processes."""

import pickle

import absl.flags
import grain
import numpy as np
import pytest

from easydel.data.batching.collate import Collator, ColumnCollator, RowCollator
from easydel.data.batching.packing import PackingLayout, pack
from easydel.data.faults import DataError
from tests.data.conftest import assert_same

ROWS = [{"prompt": f"What is {n}? ", "chosen": f"The answer is {n}.", "rejected": "I am sorry." * n} for n in range(9)]
ROWS[0]["rejected"] = "no"


def test_a_collator_survives_pickling(row_collator):
    for original in (row_collator, ColumnCollator(row_collator)):
        rows = ROWS if original is row_collator else {key: [row[key] for row in ROWS] for key in ROWS[0]}
        before = original(rows)  # also what it worked out for itself has to survive
        assert_same(pickle.loads(pickle.dumps(original))(rows), before)


def test_worker_processes_make_the_same_batches(row_collator):
    absl.flags.FLAGS.mark_as_parsed()  # Grain reads its flags when it starts processes; a program does this by itself
    batches = grain.MapDataset.source(ROWS).batch(2, batch_fn=row_collator).to_iter_dataset()
    in_workers = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=2))
    for here, there in zip(batches, in_workers, strict=True):
        assert_same(here, there)


def test_a_token_the_model_does_not_have_names_its_row(row_collator, chatml):
    smaller = RowCollator(row_collator.transform, Collator(PackingLayout(padding_value=0), vocab_size=10))
    with pytest.raises(DataError, match=r"row 0 holds token id \d+, but the model has 10 tokens"):
        smaller(ROWS)


def test_a_bad_row_is_named_by_its_place_in_the_batch(row_collator):
    with pytest.raises(DataError, match="row 1 of the batch: .*None"):
        row_collator([ROWS[0], ROWS[1] | {"chosen": None}])


def test_a_collator_of_ones_own_gets_the_pairs(chatml, row_collator):
    def with_lengths(pairs):
        return pack(pairs, PackingLayout(0)) | {"lengths": np.array([len(pair.chosen_ids) for pair in pairs])}

    own = RowCollator(row_collator.transform, Collator(PackingLayout(0), len(chatml), with_lengths))
    assert own(ROWS[:3])["lengths"].shape == (3,)


@pytest.mark.parametrize("form", ["messages", "one dict of lists a row", "one dict of lists for all rows"])
def test_chat_columns_come_in_three_forms(row_collator, form):
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    rows = [{name: [{"role": role, "content": row[name]}] for name, role in roles.items()} for row in ROWS]

    def column(name):
        messages = [row[name] for row in rows]
        fields = [{key: [message[key].encode() for message in row] for key in ("role", "content")} for row in messages]
        return {
            "messages": messages,
            "one dict of lists a row": fields,
            "one dict of lists for all rows": {key: [row[key] for row in fields] for key in ("role", "content")},
        }[form]

    assert_same(ColumnCollator(row_collator)({name: column(name) for name in rows[0]}), row_collator(rows))

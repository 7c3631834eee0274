"""Collators are values: they can be compared, pickled, and run in worker processes."""

import pickle

import absl.flags
import grain
import numpy as np
import pytest

from easydel.data.collate import Collator, ColumnCollator, RowCollator
from easydel.data.faults import DataError
from easydel.data.packing import PackingLayout, pack
from easydel.data.preference import PreferenceTransform

ROWS = [{"prompt": f"What is {n}? ", "chosen": f"The answer is {n}.", "rejected": "I am sorry." * n} for n in range(9)]
ROWS[0]["rejected"] = "no"


@pytest.fixture
def collate(chatml):
    transform = PreferenceTransform(chatml, max_length=64, max_prompt_length=32)
    return RowCollator(transform, Collator(PackingLayout(padding_value=0), vocab_size=len(chatml)))


def assert_same(batch, other):
    assert batch.keys() == other.keys()
    for key, value in batch.items():
        np.testing.assert_array_equal(value, other[key], err_msg=key)


def test_a_collator_survives_pickling(collate):
    for original in (collate, ColumnCollator(collate)):
        rows = ROWS if original is collate else {key: [row[key] for row in ROWS] for key in ROWS[0]}
        before = original(rows)  # also what it worked out for itself has to survive
        assert_same(pickle.loads(pickle.dumps(original))(rows), before)


def test_worker_processes_make_the_same_batches(collate):
    absl.flags.FLAGS.mark_as_parsed()  # Grain reads its flags when it starts processes; a program does this by itself
    batches = grain.MapDataset.source(ROWS).batch(2, batch_fn=collate).to_iter_dataset()
    in_workers = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=2))
    for here, there in zip(batches, in_workers, strict=True):
        assert_same(here, there)


def test_a_token_the_model_does_not_have_names_its_row(collate, chatml):
    smaller = RowCollator(collate.transform, Collator(PackingLayout(padding_value=0), vocab_size=10))
    with pytest.raises(DataError, match=r"row 0 holds token id \d+, but the model has 10 tokens"):
        smaller(ROWS)


def test_a_bad_row_is_named_by_its_place_in_the_batch(collate):
    with pytest.raises(DataError, match="row 1 of the batch: .*None"):
        collate([ROWS[0], ROWS[1] | {"chosen": None}])


def test_a_collator_of_ones_own_gets_the_pairs(chatml, collate):
    def with_lengths(pairs):
        return pack(pairs, PackingLayout(0)) | {"lengths": np.array([len(pair.chosen_ids) for pair in pairs])}

    own = RowCollator(collate.transform, Collator(PackingLayout(0), len(chatml), with_lengths))
    assert own(ROWS[:3])["lengths"].shape == (3,)


@pytest.mark.parametrize("form", ["messages", "one dict of lists a row", "one dict of lists for all rows"])
def test_chat_columns_come_in_three_forms(collate, form):
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

    assert_same(ColumnCollator(collate)({name: column(name) for name in rows[0]}), collate(rows))

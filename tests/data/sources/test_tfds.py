"""The columns that TFDS and tf.data really deliver give the batches of the rows they hold."""

import json
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import grain
import pytest

from easydel.data.batching.collate import ColumnCollator
from tests.data.conftest import assert_same

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")

COLUMNS = ("prompt", "chosen", "rejected")
TEXT = [{"prompt": f"What is {n}? ", "chosen": f"The answer is {n}.", "rejected": "I do not know."} for n in range(7)]
CHAT = [
    {
        "prompt": [{"role": "user", "content": row["prompt"]}] * (1 + n % 2),
        "chosen": [{"role": "assistant", "content": row["chosen"]}],
        "rejected": [{"role": "assistant", "content": row["rejected"]}],
    }
    for n, row in enumerate(TEXT)
]


def batches_of(rows, row_collator, size=3):
    return [row_collator(rows[start : start + size]) for start in range(0, len(rows), size)]


@pytest.mark.parametrize("as_numpy", [True, False])
def test_text_from_tf_data(row_collator, as_numpy):
    signature = {column: tf.TensorSpec((), tf.string) for column in COLUMNS}
    dataset = tf.data.Dataset.from_generator(lambda: iter(TEXT), output_signature=signature).batch(3)
    columns = dataset.as_numpy_iterator() if as_numpy else iter(dataset)
    for batch, expected in zip(map(ColumnCollator(row_collator), columns), batches_of(TEXT, row_collator), strict=True):
        assert_same(batch, expected)


@pytest.mark.parametrize("as_numpy", [True, False])
def test_ragged_token_ids_from_tf_data(chatml, row_collator, as_numpy):
    rows = [{column: chatml(row[column])["input_ids"] for column in COLUMNS} for row in TEXT]
    signature = {column: tf.TensorSpec((None,), tf.int64) for column in COLUMNS}
    dataset = tf.data.Dataset.from_generator(lambda: iter(rows), output_signature=signature).ragged_batch(3)
    columns = dataset.as_numpy_iterator() if as_numpy else iter(dataset)
    for batch, expected in zip(map(ColumnCollator(row_collator), columns), batches_of(rows, row_collator), strict=True):
        assert_same(batch, expected)


def sorted_keys(row):
    """TFDS keeps features by name."""
    return {column: row[column] for column in sorted(row)}


def build(tfds, folder, file_format, features, rows):
    class Preferences(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            yield from enumerate(rows)

    builder = Preferences(data_dir=folder, file_format=file_format)
    builder.download_and_prepare()
    return builder


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_a_tfds_data_source_and_its_batches(tmp_path, row_collator, kind):
    tfds = pytest.importorskip("tensorflow_datasets", reason="tensorflow-datasets is not installed")
    message = tfds.features.Sequence({"role": tfds.features.Text(), "content": tfds.features.Text()})
    feature, rows = (tfds.features.Text(), TEXT) if kind == "text" else (message, CHAT)
    # Access by number needs one file format, tf.data another.
    for_source, for_dataset = (
        build(tfds, tmp_path / name, name, dict.fromkeys(COLUMNS, feature), rows)
        for name in ("array_record", "tfrecord")
    )
    # Its own order of the rows is that of hashed keys.
    source = for_source.as_data_source("train")
    stored = [ColumnCollator(lambda rows: rows)({k: [v] for k, v in source[n].items()})[0] for n in range(len(rows))]
    assert sorted(stored, key=json.dumps) == sorted(map(sorted_keys, rows), key=json.dumps)
    expected = batches_of(stored, row_collator)
    grain_batches = grain.MapDataset.source(stored).batch(3, batch_fn=row_collator)
    for batch, wanted in zip(grain_batches, expected, strict=True):
        assert_same(batch, wanted)
    dataset = for_dataset.as_dataset(split="train", shuffle_files=False)
    dataset = dataset.batch(3) if kind == "text" else dataset.ragged_batch(3)
    for batch, wanted in zip(map(ColumnCollator(row_collator), tfds.as_numpy(dataset)), expected, strict=True):
        assert_same(batch, wanted)

"""The store of reference log-probs: what goes in comes out, for whoever shares it, or there is an error."""

from __future__ import annotations

import dataclasses
import os
import sqlite3
import stat
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easydel.data.batching.packing import PackingLayout, pack
from easydel.trainers.direct_preference_optimization_trainer.reference.cache import (
    ReferenceCache,
    ReferenceCacheError,
    scorer_digest,
)

PARTS = (-1.5, 0.0, -2.25, -0.1)
AS_STORED = tuple(float(np.float32(part)) for part in PARTS)


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def test_what_is_stored_is_found_bit_by_bit_and_never_changes():
    cache = ReferenceCache("a")
    cache.store([(key(1), PARTS)])
    cache.store([(key(1), (0.0, 0.0, 0.0, 0.0)), (key(2), PARTS)])
    assert ReferenceCache("a").find([key(1), key(2), key(3)]) == {key(1): AS_STORED, key(2): AS_STORED}
    assert len(cache) == 2
    assert ReferenceCache("b").find([key(1)]) == {}


def test_only_the_user_can_read_it(cache_of_this_test):
    path = ReferenceCache("a").path
    ReferenceCache("a").store([(key(1), PARTS)])
    assert path.is_relative_to(cache_of_this_test)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_damaged_or_foreign_file_is_an_error_that_names_it(tmp_path):
    cache = ReferenceCache("a")
    cache.path.write_text("not a database, but a text that is long enough to look like something" * 20)
    with pytest.raises(ReferenceCacheError, match="a.sqlite3 cannot be used: file is not a database"):
        cache.find([key(1)])
    cache.path.unlink()
    cache.store([(key(1), PARTS)])
    # The file of another reference under this one's name.
    other = ReferenceCache("b")
    cache.path.rename(other.path)
    with pytest.raises(ReferenceCacheError, match="belongs to another reference"):
        other.find([key(1)])
    # One bit of a value.
    cache.store([(key(1), PARTS)])
    with sqlite3.connect(cache.path) as connection:
        (value,) = connection.execute("SELECT value FROM log_probs").fetchone()
        connection.execute("UPDATE log_probs SET value = ?", (bytes([value[0] ^ 1]) + value[1:],))
    connection.close()
    with pytest.raises(ReferenceCacheError, match="a value was changed"):
        cache.find([key(1)])


def test_a_file_removed_during_a_run_is_made_again():
    cache = ReferenceCache("a")
    cache.store([(key(1), PARTS)])
    cache.path.unlink()
    cache.path.parent.rmdir()
    assert cache.find([key(1)]) == {}


def test_without_a_writable_cache_folder_a_run_keeps_its_own(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    cache = ReferenceCache("a")
    cache.store([(key(1), PARTS)])
    assert cache.find([key(1)]) == {key(1): AS_STORED}
    assert "kept for this run only" in caplog.text
    folder = cache.path.parent
    del cache
    assert not folder.exists()


@pytest.mark.parametrize(
    "message", ["database or disk is full", "attempt to write a readonly database", "disk I/O error"]
)
def test_a_cache_that_cannot_be_written_is_told_once_and_kept_in_memory(message, monkeypatch, caplog):
    cache = ReferenceCache("a")
    cache.store([(key(1), PARTS)])

    class Full(sqlite3.Connection):
        def executemany(self, *_):
            raise sqlite3.OperationalError(message)

    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda path, **options: connect(path, factory=Full, **options))
    for number in (2, 3):
        cache.store([(key(number), PARTS)])
    assert cache.find([key(number) for number in range(5)]) == {key(number): AS_STORED for number in (1, 2, 3)}
    assert caplog.text.count("kept for this run only") == 1 and message in caplog.text
    assert ReferenceCache("a").find([key(1), key(2)]) == {key(1): AS_STORED}


def test_a_cache_that_can_no_longer_be_reached_is_no_end_of_a_run(monkeypatch, caplog):
    cache = ReferenceCache("a")

    def unreachable(*_, **__):
        raise sqlite3.OperationalError("unable to open database file")

    monkeypatch.setattr(sqlite3, "connect", unreachable)
    assert cache.find([key(1)]) == {}
    cache.store([(key(1), PARTS)])
    assert cache.find([key(1)]) == {key(1): AS_STORED} and len(cache) == 1
    assert caplog.text.count("kept for this run only") == 1


def test_a_file_that_can_no_longer_be_reached_can_be_counted(monkeypatch):
    cache = ReferenceCache("a")
    cache.store([(key(1), PARTS)])
    assert len(cache) == 1

    def unreachable(*_, **__):
        raise sqlite3.OperationalError("unable to open database file")

    monkeypatch.setattr(sqlite3, "connect", unreachable)
    assert len(cache) == 0


WRITER = """
import sys
from easydel.trainers.direct_preference_optimization_trainer.reference.cache import ReferenceCache
cache, first = ReferenceCache("shared"), int(sys.argv[1])
for number in range(first, first + 60):
    cache.store([(number.to_bytes(16, "big"), (float(first), 0.0, 0.0, 0.0))])
"""


def test_processes_may_write_at_the_same_time_and_the_first_value_stays():
    # 0 to 59 and 30 to 89: half of the keys are written by both.
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(first)], env=dict(os.environ)) for first in (0, 30)]
    assert [writer.wait() for writer in writers] == [0, 0]
    found = ReferenceCache("shared").find([key(number) for number in range(90)])
    assert len(found) == 90
    for number in range(90):
        assert found[key(number)][0] in {first for first in (0.0, 30.0) if first <= number < first + 60}


def test_a_killed_process_leaves_what_it_had_stored():
    code = WRITER.replace("range(first, first + 60)", "range(5)") + "import os, signal; os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code, "0"], env=dict(os.environ), check=False).returncode == -9
    assert len(ReferenceCache("shared")) == 5


@pytest.mark.parametrize("part", ["prompt_ids", "chosen_ids", "rejected_ids", "chosen_loss_mask", "rejected_loss_mask"])
def test_any_token_and_any_mask_is_part_of_a_pairs_key(pairs, part):
    pair = pairs[0]
    changed = getattr(pair, part).copy()
    changed[0] = not changed[0] if changed.dtype == bool else changed[0] + 1
    assert dataclasses.replace(pair, **{part: changed}).tree.key != pair.tree.key


def test_a_token_on_the_other_side_of_a_boundary_is_another_pair(pairs):
    pair = dataclasses.replace(
        pairs[0], chosen_loss_mask=np.ones(pairs[0].chosen_ids.size, bool), prompt_ids=np.arange(1, 9, dtype=np.int32)
    )
    moved = dataclasses.replace(
        pair, prompt_ids=pair.prompt_ids[:-1], chosen_ids=np.concatenate([pair.prompt_ids[-1:], pair.chosen_ids])[:-1]
    )
    assert moved.tree.key != pair.tree.key


def test_place_weight_and_layout_are_no_part_of_a_pairs_key(pairs):
    assert dataclasses.replace(pairs[0], index=99, weight=0.5).tree.key == pairs[0].tree.key
    for layout in (PackingLayout(0), PackingLayout(7, packing=False, share_prompt=False, row_multiple=4)):
        batch = pack(pairs, layout)
        keys = batch["pair_keys"]
        for row, slot in np.argwhere(batch["pair_mask"]):
            assert keys[row, slot].tobytes() == pairs[batch["pair_order"][row, slot]].tree.key
        assert not keys[~batch["pair_mask"]].any()


@pytest.mark.parametrize(
    "change",
    [
        lambda model: jax.tree.map(lambda leaf: leaf.at[(0,) * leaf.ndim].add(1e-6), model),
        lambda model: dataclasses.replace(model, dtype=np.dtype(jnp.bfloat16)),
        lambda model: dataclasses.replace(model, config=dataclasses.replace(model.config, rope_theta=9e4)),
        lambda model: jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model),
    ],
    ids=["weights", "compute dtype", "config", "parameter dtype"],
)
def test_what_changes_log_probs_changes_the_digest_of_the_reference(tiny_model, change):
    assert scorer_digest(change(tiny_model)) != scorer_digest(tiny_model)


def test_a_copy_or_another_remark_in_config_json_is_the_same_reference(tiny_model):
    copy = jax.tree.map(lambda leaf: leaf.copy(), tiny_model)
    copy = dataclasses.replace(copy, config=dataclasses.replace(copy.config, hf_config='{"transformers_version": "9"}'))
    assert scorer_digest(copy) == scorer_digest(tiny_model)


def test_the_scale_of_adapters_is_part_of_the_reference(tiny_model):
    adapted = [tiny_model.apply_lora_to_layers(2, alpha, seed=0) for alpha in (8.0, 64.0)]
    assert scorer_digest(adapted[0]) != scorer_digest(adapted[1])

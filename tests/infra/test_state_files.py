"""A folder of arrays is whole, byte by byte, or refused."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easydel.infra.state_files import (
    MANIFEST,
    UNFINISHED,
    DamagedFolder,
    WriteError,
    damage_of,
    load_arrays,
    save_arrays,
    start_saving,
)

TREE = {"a": jnp.arange(6.0), "b": {"c": jnp.ones((3, 2), jnp.bfloat16), "step": jnp.int32(7)}}


@pytest.fixture
def saved(tmp_path) -> Path:
    save_arrays(tmp_path / "state", TREE)
    return tmp_path / "state"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of two megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_one_flipped_bit_in_any_file_is_refused_and_the_file_is_named(saved):
    rng = np.random.default_rng(0)
    for file in files_of(saved):
        kept = file.read_bytes()
        changed = bytearray(kept)
        changed[rng.integers(len(kept))] ^= 1 << rng.integers(8)
        file.write_bytes(changed)
        with pytest.raises(DamagedFolder, match="state is damaged" if file.name == MANIFEST else file.name):
            load_arrays(saved, TREE)
        file.write_bytes(kept)
    assert damage_of(saved) is None


def test_a_file_that_is_gone_or_cut_short_is_refused(saved):
    for file in files_of(saved):
        kept = file.read_bytes()
        for cut in (None, kept[:-1]):
            file.unlink() if cut is None else file.write_bytes(cut)
            with pytest.raises(DamagedFolder, match=file.name):
                load_arrays(saved, TREE)
        file.write_bytes(kept)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"files": 3}', '{"files": {"a": 1}}', "[" * 100_000, "\ufffd"])
def test_a_manifest_that_is_none_is_damage(saved, text):
    (saved / MANIFEST).write_text(text)
    assert MANIFEST in damage_of(saved)


def test_a_manifest_cannot_lead_out_of_its_folder(saved):
    manifest = json.loads((saved / MANIFEST).read_text())
    manifest["files"]["../../../dev/zero"] = {"size": 0, "blake2b": ""}
    (saved / MANIFEST).write_text(json.dumps(manifest))
    assert damage_of(saved) == "../../../dev/zero is missing"


def test_a_folder_by_an_older_version_says_so(saved):
    (saved / MANIFEST).unlink()
    with pytest.raises(DamagedFolder, match="by an older version"):
        load_arrays(saved, TREE)


def test_a_file_of_somebody_else_is_no_damage(saved):
    (saved / ".DS_Store").touch()
    assert jax.tree.all(jax.tree.map(np.array_equal, load_arrays(saved, TREE), TREE))


def test_nothing_has_the_name_of_a_folder_that_is_not_finished(tmp_path):
    folder = tmp_path / "größe 1%[x]"  # odd names are names too
    finish = start_saving(folder, TREE, {"notes/metadata": "{}"})
    assert not folder.exists()
    finish()
    assert damage_of(folder) is None and (folder / "notes/metadata").read_text() == "{}"
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    assert np.array_equal(load_arrays(folder, TREE)["a"], TREE["a"])


def test_what_a_killed_process_left_is_in_nobodys_way(tmp_path):
    (tmp_path / f"state{UNFINISHED}" / "arrays").mkdir(parents=True)
    save_arrays(tmp_path / "state", TREE)
    assert damage_of(tmp_path / "state") is None


def test_a_full_disk_is_one_short_message_and_leaves_nothing(small_disk, caplog, capfd):
    large = {"a": jax.random.normal(jax.random.key(0), (1000, 1000))}
    for _ in range(2):
        with pytest.raises(WriteError, match=r"state \(4.0 MB\) could not be written: No space left on device \(2"):
            save_arrays(small_disk / "state", large)
        assert not list(small_disk.iterdir())
    assert caplog.text == "" and "Traceback" not in capfd.readouterr().err
    assert len(logging.getLogger("absl").filters) == 1  # it stays, since threads of Orbax log later; once is enough
    save_arrays(small_disk / "state", TREE)
    assert damage_of(small_disk / "state") is None


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="file/state .* could not be written: Not a directory"):
        save_arrays(tmp_path / "file" / "state", TREE)


def test_a_symbolic_link_to_a_folder_is_that_folder(saved, tmp_path):
    moved = shutil.move(saved, tmp_path / "elsewhere")
    saved.symlink_to(moved)
    assert damage_of(saved) is None


def test_what_a_thread_of_orbax_logs_after_a_failed_write_is_not_shown(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError):
        save_arrays(tmp_path / "file" / "state", {"a": jnp.zeros(1)})
    late = logging.LogRecord("absl", logging.ERROR, "/x/orbax/checkpoint/future.py", 1, "told again", None, None)
    logging.getLogger("absl").handle(late)
    assert "told again" not in caplog.text

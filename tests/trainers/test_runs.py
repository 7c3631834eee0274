"""The folder of a run: who may work in it, where a run goes on, and what is left of a log; nothing is trained."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from easydel.infra.state_files import MANIFEST, DamagedFolder, WriteError, damage_of
from easydel.trainers.run import checkpoints
from easydel.trainers.run import folder as run_folder
from easydel.trainers.run.checkpoints import METADATA, Checkpoints, check_intact, latest_checkpoint
from easydel.trainers.run.metrics_log import LINES_IN_CHECKPOINT, JsonLinesTracker, json_line, restored_log
from easydel.trainers.run.record import RunRecord
from easydel.trainers.run.training_log import read_log_metadata
from easydel.trainers.training_arguments import TrainingArguments

ROOT = Path(__file__).parents[2]
ARRAYS = {"a": jnp.arange(4.0)}
NO_UPDATES = {"updates": [], "nonfinite_in_a_row": 0}
IDENTITY = {"model": "tiny"}


@pytest.fixture
def record(tmp_path):
    opened = []

    def record(**options) -> RunRecord:
        made = RunRecord(TrainingArguments(**{"save_directory": str(tmp_path), "model_name": "run"} | options))
        opened.append(made)
        return made

    yield record
    for made in opened:
        made.close(None)


def run_to(record: RunRecord, *steps: int) -> Path:
    """A run with checkpoints at these steps and a line for each update, ended."""
    assert record.open(IDENTITY) is None
    for step in range(1, max(steps) + 1):
        record.progress.step = step
        record.log.on_log(None, {"step": step, "train/loss": 1 / step})
        if step in steps:
            record.save(ARRAYS, NO_UPDATES)
    folder = record.folder
    record.close(None)
    return folder


def resume(record: RunRecord) -> list[dict]:
    checkpoint = record.open(IDENTITY)
    _, metadata = record.load(checkpoint, ARRAYS, IDENTITY)
    return record.resume(checkpoint, metadata)


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def biggest_file(checkpoint: Path) -> Path:
    return max((path for path in (checkpoint / "arrays").rglob("*") if path.is_file()), key=lambda p: p.stat().st_size)


def damage_arrays(checkpoint: Path) -> None:
    flip_a_bit(biggest_file(checkpoint))


def damage_manifest(checkpoint: Path) -> None:
    (checkpoint / MANIFEST).unlink()


def empty_it(checkpoint: Path) -> None:
    (checkpoint.parent / "9").mkdir()


def damage_metadata(checkpoint: Path) -> None:
    flip_a_bit(checkpoint / METADATA)


@pytest.mark.parametrize("damage", [damage_arrays, damage_manifest, damage_metadata, empty_it])
@pytest.mark.parametrize("named", ["latest", "run"])
def test_a_damaged_latest_checkpoint_falls_back_to_the_newest_intact_one_and_says_so(record, damage, named, caplog):
    folder = run_to(record(), 1, 2, 3)
    damage(folder / "checkpoints" / "3")
    bad, good = ("9", "3") if damage is empty_it else ("3", "2")
    again = record(resume_from_checkpoint=named if named == "latest" else str(folder))
    log = resume(again)
    assert again.folder == folder and again.progress.step == int(good)
    assert [line["step"] for line in log] == list(range(1, int(good) + 1))
    (message,) = [entry.getMessage() for entry in caplog.records]
    assert f"checkpoints/{bad} is damaged (" in message and f"taking {folder}/checkpoints/{good}" in message
    # The number is free again, and what was damaged can still be looked at.
    assert (folder / "checkpoints" / f"{bad}.damaged").is_dir()
    again.progress.step = 3
    again.save(ARRAYS, NO_UPDATES)
    again.checkpoints.wait()
    assert damage_of(folder / "checkpoints" / "3") is None


def test_a_damaged_checkpoint_that_is_named_is_refused_with_the_newest_intact_one(record):
    folder = run_to(record(), 1, 2, 3)
    damage_arrays(folder / "checkpoints" / "3")
    named = record(resume_from_checkpoint=str(folder / "checkpoints" / "3"))
    with pytest.raises(DamagedFolder, match=r"3 is damaged \(arrays/.*\); the newest intact one is .*/checkpoints/2\."):
        named.open(IDENTITY)
    with pytest.raises(FileNotFoundError, match="is no checkpoint"):
        check_intact(folder)


def test_where_no_checkpoint_is_intact_nothing_starts_anew_in_silence(record):
    folder = run_to(record(), 1, 2)
    for step in ("1", "2"):
        damage_arrays(folder / "checkpoints" / step)
    with pytest.raises(DamagedFolder, match=r"2 is damaged .*1 is damaged .*No checkpoint of .*/run is intact"):
        record(resume_from_checkpoint="latest").open(IDENTITY)


def test_the_second_of_two_processes_is_refused_whether_or_not_there_is_a_checkpoint_yet(record):
    first = record(resume_from_checkpoint="latest")
    assert first.open(IDENTITY) is None
    with pytest.raises(ValueError, match="another process is at work in .*/run;"):
        record(resume_from_checkpoint="latest").open(IDENTITY)
    for step in (1, 2):
        first.progress.step = step
        first.save(ARRAYS, NO_UPDATES)
        first.checkpoints.wait()
        for named in ("latest", str(first.folder), str(first.folder / "checkpoints" / str(step))):
            with pytest.raises(ValueError, match="another process is at work in .*/run;"):
                record(resume_from_checkpoint=named).open(IDENTITY)


def test_fresh_runs_that_start_together_get_a_folder_each(record):
    records = [record() for _ in range(3)]
    for each in records:
        each.open(IDENTITY)
    assert sorted(each.folder.name for each in records) == ["run", "run-2", "run-3"]


def test_the_lock_of_a_killed_process_is_free(record, tmp_path):
    code = (
        "import os, signal, sys; from easydel.trainers.run.folder import take_lock; from pathlib import Path\n"
        "lock = take_lock(Path(sys.argv[1])); os.kill(os.getpid(), signal.SIGKILL)"
    )
    folder = run_to(record(), 1)
    killed = subprocess.run([sys.executable, "-c", code, str(folder)], cwd=ROOT, check=False)
    assert killed.returncode == -9
    resume(record(resume_from_checkpoint="latest"))


def test_a_run_of_another_name_is_not_taken_for_this_one(record, tmp_path):
    run_to(record(), 1)
    run_to(record(model_name="run-2"), 1)
    again = record(resume_from_checkpoint="latest")
    resume(again)
    assert again.folder == tmp_path / "run"


def test_a_run_folder_may_be_a_link_and_have_an_odd_name(record, tmp_path):
    folder = run_to(record(model_name="größe [1] 100%"), 1)
    elsewhere = folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(elsewhere)
    again = record(model_name="größe [1] 100%", resume_from_checkpoint="latest")
    assert [line["step"] for line in resume(again)] == [1]
    assert again.folder == folder


def test_a_run_that_is_refused_before_its_first_update_leaves_nothing(record, tmp_path):
    refused = record(save_directory=str(tmp_path / "new" / "runs"))
    refused.open(IDENTITY)
    assert refused.folder.is_dir()
    refused.close(ValueError("the rows cannot be used"))
    assert not (tmp_path / "new").exists() and refused.folder is None
    kept = record()
    kept.open(IDENTITY)
    kept.progress.step = 1
    kept.log.on_log(None, {"step": 1})
    kept.close(ValueError("too many rows were dropped"))
    assert kept.folder.is_dir()


def test_a_save_directory_that_is_a_file_or_cannot_be_written_to_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for path in ("file", "file/runs"):
        with pytest.raises(NotADirectoryError, match=r"save_directory=.*/file is no folder"):
            run_folder.check_save_directory(str(tmp_path / path))
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(PermissionError, match="cannot be written to"):
        run_folder.check_save_directory(str(tmp_path / "runs"))


@pytest.mark.parametrize("name", ["a/b", "..", "", "a\nb", "a\0b", "\x1b[31m"])
def test_a_model_name_that_is_no_name_of_a_folder_is_refused(name):
    with pytest.raises(ValueError, match="expected the name of a folder"):
        TrainingArguments(model_name=name)


def rewrite_metadata(checkpoint: Path, **changes) -> None:
    """Change the metadata and make the manifest agree, as an attacker would."""
    from easydel.infra.state_files import folder_contents

    metadata = json.loads((checkpoint / METADATA).read_text()) | changes
    (checkpoint / METADATA).write_text(json.dumps(metadata))
    (checkpoint / MANIFEST).unlink()
    (checkpoint / MANIFEST).write_text(json.dumps({"files": folder_contents(checkpoint)}))


PLACE = {"step": 1, "data": None, "evaluated": None}
LINES = {"before": 0, "digest": "", "latest": []}


@pytest.mark.parametrize(
    "changes",
    [
        {"place": 3},
        {"place": {}} | {"place": {"stop": 1}},
        {"place": PLACE | {"step": "1"}},
        {"place": PLACE | {"data": []}},
        {"place": PLACE | {"evaluated": 0.5}},
        {"log": []},
        {"identity": None},
        {"options": "x"},
        {"evaluations": {"one": {}}},
        {"evaluations": {"1": 3}},
        {"evaluations": {"1": {"eval/loss": "low"}}},
        {"lines": LINES | {"before": "many"}},
        {"lines": LINES | {"latest": 3}},
        {"lines": LINES | {"latest": [{"step": "1"}]}},
        {"lines": {}},
    ],
)
def test_metadata_of_the_wrong_type_are_named(record, changes):
    folder = run_to(record(), 1)
    rewrite_metadata(folder / "checkpoints" / "1", **changes)
    with pytest.raises(DamagedFolder, match=r"the metadata of .*/1 is damaged \("):
        resume(record(resume_from_checkpoint=str(folder)))


UPDATE = {
    "step": 1,
    "metrics": {"loss": 0.5},
    "nonfinite": False,
    "statistics": {"examples": 1, "tokens": 2, "flops": 1.0, "means": {}, "names": "row 0"},
}


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"updates": 3, "nonfinite_in_a_row": 0},
        {"updates": [], "nonfinite_in_a_row": "0"},
        *(
            {"updates": [update], "nonfinite_in_a_row": 0}
            for update in (3, {}, UPDATE | {"step": None}, UPDATE | {"metrics": 3}, UPDATE | {"metrics": {"loss": "x"}},
                           UPDATE | {"nonfinite": 1}, UPDATE | {"statistics": {}}, UPDATE | {"more": 1},
                           UPDATE | {"statistics": UPDATE["statistics"] | {"examples": "1"}})
        ),
    ],
)  # fmt: skip
def test_metadata_of_a_log_line_of_the_wrong_type_are_named(metadata):
    with pytest.raises(ValueError, match="^log"):
        read_log_metadata(metadata)
    assert len(read_log_metadata({"updates": [UPDATE], "nonfinite_in_a_row": 0})[0]) == 1


def lines(number: int) -> list[dict]:
    return [
        {"step": step, "train/loss": math.inf if step == 2 else step / 7, "train/x": [1.0]} for step in range(number)
    ]


def test_a_log_that_is_gone_or_damaged_comes_back_out_of_the_checkpoint(record, caplog):
    folder = run_to(record(), 3)
    expected = (folder / "metrics.jsonl").read_text()
    for damaged in (
        None,
        "",
        expected[:30],
        "{}\n[1]\n" + "[" * 100_000 + '\n{"step": "a"}\n\xff\0',
        expected.replace("1", "9"),
    ):
        if damaged is None:
            (folder / "metrics.jsonl").unlink()
        else:
            (folder / "metrics.jsonl").write_text(damaged)
        again = record(resume_from_checkpoint="latest")
        assert [line["step"] for line in resume(again)] == [1, 2, 3]
        again.log.on_train_begin(None)
        again.close(None)
        assert (folder / "metrics.jsonl").read_text() == expected
    assert caplog.text == ""


def test_evaluations_asked_for_behind_a_checkpoint_stay_in_the_log(tmp_path):
    tracker = JsonLinesTracker(tmp_path, lines(3))
    tracker.on_train_begin(None)
    metadata = json.loads(json.dumps(tracker.metadata()))
    for line in ({"step": 2, "eval/loss": 0.5}, {"step": 2, "train/loss": 0.5}, {"step": 3, "eval/loss": 0.4}):
        tracker.on_log(None, line)
    assert restored_log(tmp_path, 2, metadata)[3:] == [{"step": 2, "eval/loss": 0.5}]


def test_of_a_long_log_the_checkpoint_keeps_the_end_and_says_what_else_is_missing(tmp_path, caplog):
    tracker = JsonLinesTracker(tmp_path, lines(LINES_IN_CHECKPOINT + 50))
    tracker.on_train_begin(None)
    metadata = json.loads(json.dumps(tracker.metadata()))
    last = LINES_IN_CHECKPOINT + 49
    assert len(json.dumps(metadata)) < 2**20
    assert [line["step"] for line in restored_log(tmp_path, last, metadata)] == list(range(last + 1))
    assert caplog.text == ""
    text = tracker.path.read_text()
    for damaged, there in ((text.split("\n", 10)[-1], 40), (text.replace('"step": 7,', '"step": 8,', 1), 50)):
        tracker.path.write_text(damaged)
        caplog.clear()
        assert len(restored_log(tmp_path, last, metadata)) == LINES_IN_CHECKPOINT + there
        assert f"was damaged: {there} of the 50 lines before update 50 are there" in caplog.text


def test_a_log_that_cannot_be_written_is_told_once_and_written_later(tmp_path, monkeypatch, caplog):
    tracker = JsonLinesTracker(tmp_path)
    tracker.on_train_begin(None)
    tracker.on_log(None, lines(1)[0])
    opened = Path.open

    def full(path, mode="r", *arguments, **options):
        if "r" in mode:
            return opened(path, mode, *arguments, **options)
        with opened(path, mode, *arguments, **options) as file:
            file.write("{half a li")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        patch.setattr(Path, "write_text", lambda path, text, **_: full(path, "w"))
        for line in lines(5)[1:4]:
            tracker.on_log(None, line)
    assert caplog.text.count("cannot be written to (No space left on device)") == 1
    tracker.on_log(None, lines(5)[4])
    assert tracker.path.read_text() == "".join(map(json_line, lines(5)))
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert "no line is missing" in caplog.text


def test_a_run_folder_that_is_removed_while_training_is_made_again(record):
    import shutil

    run = record()
    run.open(IDENTITY)
    run.log.on_train_begin(None)
    for step in (1, 2):
        run.progress.step = step
        run.log.on_log(None, {"step": step})
        run.save(ARRAYS, NO_UPDATES)
        run.checkpoints.wait()
        if step == 1:
            shutil.rmtree(run.folder)
    assert [json.loads(line)["step"] for line in (run.folder / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    assert latest_checkpoint(run.folder).name == "2"


def test_a_checkpoint_that_cannot_be_written_is_told_and_the_next_one_is_tried(record, monkeypatch, caplog):
    run = record()
    run.open(IDENTITY)

    def full(*_):
        raise WriteError("3 (4.0 MB) could not be written: No space left on device (0.0 MB free)")

    for step in (1, 2, 3):
        run.progress.step = step
        with monkeypatch.context() as patch:
            if step != 2:
                patch.setattr(checkpoints, "start_saving", full)
            run.save(ARRAYS, NO_UPDATES)
    assert caplog.text.count("No space left on device (0.0 MB free). Training continues") == 2
    with pytest.raises(WriteError, match="the last checkpoint, 3 .* The trained model is in trainer.model"):
        run.close(None)
    assert run.last_checkpoint == latest_checkpoint(run.folder) == run.folder / "checkpoints" / "2"
    run.checkpoints.failure = None  # the fixture closes once more


def test_an_error_that_ended_the_run_is_not_hidden_by_a_checkpoint_that_failed(record, monkeypatch):
    run = record()
    run.open(IDENTITY)
    run.progress.step = 1
    run.checkpoints.failure = WriteError("full")
    run.close(ZeroDivisionError())
    run.checkpoints.failure = None


def test_old_checkpoints_go_only_when_the_new_one_is_whole(tmp_path):
    kept = Checkpoints(1, lower_is_better=True)
    kept.open(tmp_path)
    for step, loss in ((1, 0.5), (2, 0.7), (3, math.nan)):
        kept.save(step, ARRAYS, {}, {1: 0.5, 2: 0.7, step: loss})
    kept.wait()
    assert sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir()) == ["1", "3"]
    assert kept.best({1: 0.5, 2: 0.7, 3: math.nan}).name == "1"


def test_one_flipped_bit_anywhere_in_a_checkpoint_is_found(record):
    checkpoint = run_to(record(), 1) / "checkpoints" / "1"
    rng = np.random.default_rng(1)
    for file in [path for path in checkpoint.rglob("*") if path.is_file()]:
        kept = file.read_bytes()
        for _ in range(3):
            changed = bytearray(kept)
            changed[rng.integers(len(kept))] ^= 1 << rng.integers(8)
            file.write_bytes(changed)
            with pytest.raises(DamagedFolder, match=r"1 is damaged \("):
                check_intact(checkpoint)
        file.write_bytes(kept)


KILLED = """
import sys, time, random
import jax.numpy as jnp
from pathlib import Path
from easydel.trainers.run.checkpoints import Checkpoints
kept = Checkpoints(1, True)
kept.open(Path(sys.argv[1]))
step = int(sys.argv[2])
print("begun", flush=True)
while True:
    step += 1
    kept.save(step, {"a": jnp.full(200_000, float(step))}, {"step": step}, {})
"""


@pytest.mark.slow
def test_a_kill_at_any_moment_of_writing_leaves_an_intact_checkpoint(tmp_path):
    rng, step = np.random.default_rng(0), 0
    for _ in range(12):
        command = [sys.executable, "-c", KILLED, str(tmp_path), str(step)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            time.sleep(rng.uniform(0.3, 2.0))
            process.kill()
        found = latest_checkpoint(tmp_path)
        assert found is None or (damage_of(found) is None and int(found.name) >= step)
        step = 0 if found is None else int(found.name)
    assert step


def test_a_tracker_that_fails_is_named_once_and_off(caplog):
    from easydel.trainers.callbacks.callback import Callbacks, TrainerCallback, Watcher

    class Server(Watcher):
        def on_log(self, trainer, line):
            raise ConnectionError("the server is gone")

    class Own(TrainerCallback):
        def on_log(self, trainer, line):
            raise ZeroDivisionError

    callbacks = Callbacks([Server()])
    for _ in range(2):
        callbacks.notify(None, "on_log", {})
    assert caplog.text.count("Server failed (ConnectionError: the server is gone) and is off") == 1
    with pytest.raises(ZeroDivisionError):
        Callbacks([Own()]).notify(None, "on_log", {})


def test_a_missing_or_broken_tracker_package_is_named_when_options_are_made(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ValueError, match=r"report_to=tensorboard needs the package tensorboardX.*pip install"):
        TrainingArguments(report_to=("tensorboard",))


def test_tensorboard_writes_what_a_reader_finds_and_its_errors_come_to_us(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    from easydel.trainers.callbacks.trackers import TensorBoardTracker

    tracker = TensorBoardTracker(tmp_path)
    tracker.on_train_begin(None)
    tracker.on_log(None, {"step": 3, "train/loss": 0.5, "train/histogram": [1, 2]})
    tracker.on_train_end(None)
    (file,) = tmp_path.glob("events.out.tfevents.*")
    content, values = file.read_bytes(), []
    while content:
        size = int.from_bytes(content[:8], "little")
        event = Event.FromString(content[12 : 12 + size])
        values += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        content = content[16 + size :]
    assert values == [(3, "train/loss", 0.5)]
    broken = TensorBoardTracker(tmp_path / "nowhere")
    with pytest.raises(OSError, match="nowhere"):
        broken.on_train_begin(None)


def test_a_checkpoint_that_lies_alone_under_a_name_of_its_own_begins_a_new_run(record, tmp_path):
    folder = run_to(record(), 3)
    alone = shutil.copytree(folder / "checkpoints" / "3", tmp_path / "kept" / "checkpoints" / "best")
    resumed = record(resume_from_checkpoint=str(alone), model_name="next")
    resume(resumed)
    assert resumed.progress.step == 3
    assert resumed.folder == tmp_path / "next"


def test_a_checkpoint_in_the_home_folder_of_nobody_is_refused(record):
    with pytest.raises(FileNotFoundError, match="home folder that is not known"):
        record(resume_from_checkpoint="~nobody-here/run").open(IDENTITY)

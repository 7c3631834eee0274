"""A chat template with today's date: a run has one day, whenever it resumes."""

from __future__ import annotations

import copy
import datetime
import logging

import pytest
from datasets import Dataset

from easydel import DPOConfig, DPOTrainer
from easydel.trainers.run.checkpoints import FOLDER, METADATA, read_metadata
from easydel.trainers.run.identity import as_json, refuse_other_run
from tests.tiny import CHATML

SATURDAY, SUNDAY = datetime.datetime(2025, 3, 1, 23, 59, 30, 7), datetime.datetime(2025, 3, 2, 8)
DATED = "<|im_start|>system\n{{ strftime_now('%d %m %Y') }}<|im_end|>\n" + CHATML


@pytest.fixture
def make(tiny_model, tokenizer, rows, tmp_path):
    def make(now, template=DATED, **options):
        own = copy.copy(tokenizer)
        own.chat_template = template
        config = DPOConfig(
            save_directory=str(tmp_path),
            model_name="run",
            total_batch_size=4,
            save_steps=1,
            save_total_limit=None,
            progress_bar=False,
            learning_rate=1e-2,
            **options,
        )
        return DPOTrainer(config, tiny_model, None, own, Dataset.from_list(rows), now=now)

    return make


def first_prompt(trainer, tokenizer) -> str:
    return tokenizer.decode(trainer.dataloaders.train.first_pairs(1)[0].prompt_ids)


def losses(output) -> list[float]:
    return [line["train/loss"] for line in output.log_history if "train/loss" in line]


def test_a_run_resumed_the_next_day_goes_on_with_its_own_day_and_says_so(make, tokenizer, caplog):
    whole = make(SATURDAY).train()
    assert len(losses(whole)) == 3
    with caplog.at_level(logging.INFO, logger="easydel"):
        resumed = make(SUNDAY, resume_from_checkpoint=str(whole.run_folder / FOLDER / "1"))
    said = [record.getMessage() for record in caplog.records if "date" in record.getMessage()]
    assert said == [
        "the chat template shows the date: the run continues with 2025-03-01, when it began; today is 2025-03-02."
    ]
    assert "01 03 2025" in first_prompt(resumed, tokenizer)
    output = resumed.train()
    assert losses(output) == losses(whole)
    # The third day, from a checkpoint of the second, has still the first day.
    metadata = read_metadata(output.last_checkpoint)
    assert metadata["identity"]["chat_template_time"] == "2025-03-01T23:59:30"


def test_a_new_run_has_its_own_day_and_the_difference_is_named(make, tokenizer, caplog):
    output = make(SATURDAY).train()
    new = make(SUNDAY)
    assert "02 03 2025" in first_prompt(new, tokenizer)
    with pytest.raises(
        ValueError, match="chat_template_time: the checkpoint has '2025-03-01T23:59:30', this run '2025-03"
    ):
        refuse_other_run(
            output.last_checkpoint, read_metadata(output.last_checkpoint)["identity"], as_json(new.run_identity())
        )
    assert "date" not in caplog.text


def test_resuming_on_the_same_day_says_nothing(make, caplog):
    output = make(SATURDAY).train()
    make(SATURDAY.replace(hour=1), resume_from_checkpoint=str(output.last_checkpoint))
    assert "date" not in caplog.text


def test_no_day_is_kept_with_a_run_whose_template_shows_none(make):
    assert "chat_template_time" not in make(SATURDAY, template=CHATML).run_identity()


def test_what_is_wrong_with_a_checkpoint_is_told_by_train(make):
    with pytest.raises(FileNotFoundError, match="no checkpoint there"):
        make(SATURDAY, resume_from_checkpoint="nowhere").train()


@pytest.mark.parametrize("resume_from", ["latest", "run"])
def test_the_day_is_known_where_the_latest_checkpoint_is_damaged(make, tokenizer, resume_from):
    output = make(SATURDAY).train()
    (output.last_checkpoint / METADATA).write_text("[]")
    where = "latest" if resume_from == "latest" else str(output.run_folder)
    resumed = make(SUNDAY, resume_from_checkpoint=where)
    assert "01 03 2025" in first_prompt(resumed, tokenizer)
    assert losses(resumed.train()) == losses(output)

"""The command as a user meets it: output, files, exit codes."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import easydel
from easydel.cli import main
from easydel.cli.inputs import read_chat_template
from easydel.infra.state_files import WriteError
from easydel.modules.auto import AutoEasyDeLModelForCausalLM
from easydel.tokenizer.tokenizer import load_tokenizer
from easydel.trainers.direct_preference_optimization_trainer.dpo_trainer import DPOTrainer
from easydel.trainers.trainer_protocol import NonFiniteError
from tests.cli.conftest import ROWS, write_rows


@pytest.fixture
def no_weights(monkeypatch):
    """Fail as soon as anything asks for a model's weights."""

    def load(*_, **__):
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr(AutoEasyDeLModelForCausalLM, "from_pretrained", load)


def dpo(model: Path, train: Path, *more: str) -> int:
    return main(["dpo", "--model", str(model), "--train-dataset", str(train), "--no-progress-bar", *more])


def test_a_run_leaves_a_model_that_loads_and_its_log(model_folder, train_file, tmp_path, capsys):
    held_out = write_rows(tmp_path / "held_out.jsonl", ROWS)
    output = tmp_path / "out"
    code = dpo(
        model_folder, train_file, "--eval-dataset", f"held_out={held_out}", "--output", str(output),
        "--reference-model", str(model_folder), "--dtype", "float32", "--learning-rate", "1e-3",
        "--total-batch-size", "2", "--max-training-steps", "2", "--num-train-epochs", "2",
    )  # fmt: skip
    assert code == 0
    shown = capsys.readouterr().out
    assert f"model: {output / 'model'}" in shown
    assert "train: loss 0." in shown and "eval/held_out: loss 0." in shown
    assert "No rows were dropped" in shown
    trained = AutoEasyDeLModelForCausalLM.from_pretrained(str(output / "model"))
    start = AutoEasyDeLModelForCausalLM.from_pretrained(str(model_folder))
    assert trained.num_parameters == start.num_parameters
    assert (trained.output_embedding != start.output_embedding).any()
    assert load_tokenizer(output / "model").encode("Four.") == load_tokenizer(model_folder).encode("Four.")
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert next(line["train/loss"] for line in lines if "train/loss" in line) == pytest.approx(0.6931, abs=1e-4)


def test_a_run_on_a_mixture_says_how_many_rows_it_takes(model_folder, train_file, tmp_path, capsys):
    more = write_rows(tmp_path / "more.jsonl", ROWS * 4)
    command = ["dpo", "--model", str(model_folder), "--no-progress-bar", "--output", str(tmp_path / "out")]
    mixed = ["--train-dataset", f"{train_file}=1", f"{more}=2", "--total-batch-size", "2", "--max-training-steps", "1"]
    assert main([*command, *mixed]) == 0
    rows = len(train_file.read_text().splitlines())
    shown = capsys.readouterr().out
    # The pattern is more, train, more; one more row of the longer file comes before train is due again.
    assert f"mixture: {rows} of {rows} rows of {train_file}; {2 * rows + 1} of {4 * rows} rows of {more}" in shown


def test_a_weight_of_zero_and_a_stream_without_an_end_stop_before_the_weights(
    model_folder, train_file, tmp_path, no_weights, capsys
):
    assert dpo(model_folder, f"{train_file}=0") == 2
    assert f"{train_file}=0 in train_dataset: expected a weight above 0" in capsys.readouterr().err
    packed = tmp_path / "train.jsonl.gz"
    packed.write_bytes(gzip.compress(train_file.read_bytes()))
    assert dpo(model_folder, packed) == 2
    assert "set max_training_steps" in capsys.readouterr().err


def test_a_run_with_adapters_leaves_them_merged_and_alone(model_folder, train_file, tmp_path, capsys):
    output = tmp_path / "out"
    code = dpo(
        model_folder, train_file, "--output", str(output), "--dtype", "float32", "--learning-rate", "1e-2",
        "--total-batch-size", "2", "--num-train-epochs", "2", "--lora-rank", "4", "--lora-pattern", "q_proj|v_proj",
    )  # fmt: skip
    assert code == 0
    assert f"adapter: {output / 'adapter'}" in capsys.readouterr().out
    merged = AutoEasyDeLModelForCausalLM.from_pretrained(str(output / "model"))
    adapted = AutoEasyDeLModelForCausalLM.from_pretrained(str(output / "adapter"))  # names the model it was made for
    start = AutoEasyDeLModelForCausalLM.from_pretrained(str(model_folder))
    assert adapted.has_lora and not merged.has_lora
    ids = np.arange(3, 20)[None]
    np.testing.assert_allclose(merged(ids), adapted(ids), rtol=1e-5, atol=1e-5)
    assert np.abs(merged(ids) - start(ids)).max() > 1e-4
    assert main(["dpo", "--model", "m", "--train-dataset", "t", "--lora-alpha", "8"]) == 2
    assert "lora_alpha=8.0 has no effect with lora_rank=None" in capsys.readouterr().err


def test_show_prints_the_row_without_loading_weights(model_folder, train_file, no_weights, capsys):
    assert main(["show", str(train_file), "--model", str(model_folder), "--row", "1", "--max-length", "24"]) == 0
    shown = capsys.readouterr().out
    assert all(part in shown for part in ("row 1", "prompt: 14 tokens", "chosen", "rejected", "Name a colour."))


def test_show_takes_the_file_of_a_run(model_folder, train_file, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {model_folder}\nbeta: 0.3\nmax_prompt_length: 5\n")
    assert main(["show", str(train_file), "--config", str(path)]) == 0
    assert "prompt: 5 tokens, 15 tokens cut off" in capsys.readouterr().out


def test_show_says_why_a_row_would_be_dropped(model_folder, tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", [ROWS[0] | {"rejected": ""}])
    assert main(["show", str(rows), "--model", str(model_folder)]) == 2
    assert "empty completion" in capsys.readouterr().out


def test_show_reads_the_margin_where_the_objective_of_the_run_does(model_folder, tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", [ROWS[0] | {"margin": "none"}])
    command = ["show", str(rows), "--model", str(model_folder)]
    assert main(command) == 0
    assert 'columns that are not read: "margin"' in capsys.readouterr().out
    assert main([*command, "--loss-type", "odpo"]) == 2
    assert "margin" in capsys.readouterr().out
    assert main([*command, "--loss-type", "odpoo"]) == 2
    assert "loss_type='odpoo', expected one of " in capsys.readouterr().err.replace("\n", " ")


def test_show_names_the_columns_that_are_not_read(model_folder, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a b", "chosen": " c", "rejected": " d", "score": 3, "weight": 1, "\\u001b[31m": 2}\n')
    assert main(["show", str(rows), "--model", str(model_folder)]) == 0
    output = capsys.readouterr().out
    assert 'not read: "score", "\\x1b[31m"' in output and "\x1b" not in output


def test_an_error_shows_control_characters_as_escapes(capsys):
    assert main(["sh\x1b[31mow"]) == 2
    error = capsys.readouterr().err
    assert "sh\\x1b[31mow" in error and "\x1b" not in error


@pytest.mark.parametrize("row", ["2", "-1"])
def test_show_refuses_a_row_that_is_not_there(model_folder, train_file, row, capsys):
    assert main(["show", str(train_file), "--model", str(model_folder), "--row", row]) == 2
    assert f"easydel: error: --row {row}" in capsys.readouterr().err


def test_a_chat_template_can_be_given(model_folder, tmp_path, capsys):
    turn = [{"role": "assistant", "content": "Blue."}]
    row = {"prompt": [{"role": "user", "content": "Colour?"}], "chosen": turn, "rejected": "Seventeen."}
    rows = write_rows(tmp_path / "chat.jsonl", [row])
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    show = ["show", str(rows), "--model", str(model_folder)]
    assert main(show) == 2
    assert "chat template" in capsys.readouterr().out
    assert main([*show, "--chat-template", str(template)]) == 0
    assert "user: Colour?" in capsys.readouterr().out
    assert main([*show, "--chat-template", str(tmp_path / "none.jinja")]) == 2
    assert "none.jinja cannot be read" in capsys.readouterr().err


def test_rows_without_a_needed_column_stop_before_the_weights(model_folder, train_file, tmp_path, no_weights, capsys):
    bad = write_rows(tmp_path / "bad.jsonl", [{"prompt": "a", "chosen": "b"}])
    assert dpo(model_folder, bad) == 2
    assert 'easydel: error: bad.jsonl, row 0: there is no column "rejected"' in capsys.readouterr().err
    assert dpo(model_folder, train_file, "--eval-dataset", str(bad)) == 2
    assert "bad.jsonl, row 0" in capsys.readouterr().err


def test_missing_files_stop_before_the_weights(model_folder, train_file, tmp_path, no_weights, capsys):
    (tmp_path / "empty").mkdir()
    for model, train, message in (
        (model_folder, tmp_path / "trian.jsonl", "there is no file"),
        (tmp_path / "none", train_file, "is neither a folder, a .gguf file nor a hub id"),
        (tmp_path / "empty", train_file, "holds no tokenizer"),
        (train_file, train_file, "is a file; expected a Hugging Face folder or a .gguf file"),
    ):
        assert dpo(model, train) == 2
        error = capsys.readouterr().err
        assert error.startswith("easydel: error: ") and message in error and "Traceback" not in error


def test_a_damaged_tokenizer_is_named(model_folder, train_file, tmp_path, capsys):
    (tmp_path / "tokenizer.json").write_text("{")
    assert dpo(tmp_path, train_file) == 2
    assert f"the tokenizer of {tmp_path} cannot be read" in capsys.readouterr().err


def test_a_model_whose_weights_do_not_fit_is_a_wrong_file(model_folder, train_file, tmp_path, capsys):
    for file in model_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    assert dpo(tmp_path, train_file) == 2
    assert "easydel: error: the weights do not fit config.json" in capsys.readouterr().err


def test_more_bad_rows_than_allowed_stop_the_run(model_folder, tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", ROWS + [ROWS[0] | {"chosen": " "}] * 200)
    assert dpo(model_folder, rows, "--output", str(tmp_path / "out")) == 2
    assert "rows cannot be used, over the limit of 5 %" in capsys.readouterr().err


@pytest.mark.parametrize(("error", "code"), [(NonFiniteError("update 3 was skipped"), 1), (KeyboardInterrupt(), 130)])
def test_a_run_that_breaks_off_has_its_own_exit_code(error, code, model_folder, train_file, tmp_path, monkeypatch):
    def train(_):
        raise error

    monkeypatch.setattr(DPOTrainer, "train", train)
    assert dpo(model_folder, train_file, "--output", str(tmp_path / "out")) == code


@pytest.mark.parametrize("stage", [(AutoEasyDeLModelForCausalLM, "from_pretrained"), (DPOTrainer, "train")])
def test_a_bug_keeps_its_traceback(stage, model_folder, train_file, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise ValueError("shapes do not match")

    monkeypatch.setattr(*stage, broken)
    with pytest.raises(ValueError, match="shapes do not match"):
        dpo(model_folder, train_file, "--output", str(tmp_path / "out"))


def test_a_missing_tracker_package_stops_before_the_weights_and_leaves_nothing(
    model_folder, train_file, tmp_path, no_weights, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    assert dpo(model_folder, train_file, "--output", str(tmp_path / "a/b"), "--report-to", "tensorboard") == 2
    error = capsys.readouterr().err
    assert 'pip install "easydel-dpo[tensorboard]"' in error and error.count("\n") == 1
    assert not (tmp_path / "a").exists()


def test_an_output_that_cannot_be_made_stops_before_the_weights(model_folder, train_file, tmp_path, no_weights, capsys):
    (tmp_path / "file").touch()
    assert dpo(model_folder, train_file, "--output", str(tmp_path / "file" / "run")) == 2
    assert f"{tmp_path / 'file'} is no folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", [["--resume-from-checkpoint", "nowhere"], ["--best-metric", "eval/x", "--evaluation-steps", "1",
                                                          "--early-stopping-patience", "1"]]
)  # fmt: skip
def test_a_run_that_is_refused_leaves_nothing_behind(options, model_folder, train_file, tmp_path, capsys):
    run = ["--output", str(tmp_path / "runs/first"), "--total-batch-size", "2", "--eval-dataset", str(train_file)]
    assert dpo(model_folder, train_file, *run, *options) == 2
    assert "easydel: error: " in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_model_that_cannot_be_written_is_a_failed_run_and_can_be_written_again(
    model_folder, train_file, tmp_path, monkeypatch, capsys
):
    run = ["--output", str(tmp_path / "out"), "--total-batch-size", "2", "--save-steps", "1"]

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(DPOTrainer, "save_pretrained", full)
        assert dpo(model_folder, train_file, *run) == 1
    error = capsys.readouterr().err
    assert f"could not be written to {tmp_path / 'out'}: No space left on device" in error
    assert dpo(model_folder, train_file, *run, "--resume-from-checkpoint", "latest") == 0
    assert (tmp_path / "out/model/model.safetensors").is_file()


def test_a_last_checkpoint_that_cannot_be_written_is_a_failed_run_with_its_model(
    model_folder, train_file, tmp_path, monkeypatch, capsys
):
    def full(*_):
        raise WriteError("1 (4.0 MB) could not be written: No space left on device (0.0 MB free)")

    monkeypatch.setattr("easydel.trainers.run.checkpoints.start_saving", full)
    run = ["--output", str(tmp_path / "out"), "--total-batch-size", "2", "--save-steps", "1"]
    assert dpo(model_folder, train_file, *run) == 1
    assert "No space left on device (0.0 MB free). The trained model" in capsys.readouterr().err
    assert (tmp_path / "out/model/model.safetensors").is_file()


def test_a_disk_without_room_for_the_model_is_found_before_training(
    model_folder, train_file, tmp_path, monkeypatch, capsys
):
    usage = SimpleNamespace(free=10)
    monkeypatch.setattr("easydel.cli.dpo.shutil.disk_usage", lambda _: usage)
    assert dpo(model_folder, train_file, "--output", str(tmp_path / "runs/out")) == 2
    assert "has 0.0 MB free, and the trained model alone takes" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_help_and_version_of_the_program(capsys):
    assert main([]) == main(["--help"]) == main(["-h"]) == 0
    assert "easydel COMMAND" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"easydel {easydel.__version__}\n"


@pytest.mark.parametrize("command", ["dpo", "show"])
def test_help_of_a_command_lists_its_options(command, capsys):
    assert main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"easydel {command}" in shown and "--max-prompt-length INT" in shown and "(default: 256)" in shown


def test_an_unknown_command_is_refused(capsys):
    assert main(["shwo"]) == 2
    assert capsys.readouterr().err == (
        "easydel: error: unknown command shwo; did you mean show?\nThe commands are dpo and show.\n"
    )


HEAVY_FREE = [["--help"], ["--version"], ["shwo"], ["dpo", "--help"], ["show", "--help"], ["dpo", "--learning-rte"]]


@pytest.mark.parametrize("arguments", HEAVY_FREE)
def test_help_and_wrong_commands_need_nothing_heavy(arguments):
    code = (
        f"import runpy, sys; sys.argv = ['easydel', *{arguments}]\n"
        "try: runpy.run_module('easydel', run_name='__main__')\n"
        "except SystemExit as end: pass\n"
        "print([name for name in ('jax', 'numpy', 'transformers', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")


GOOD_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (GOOD_TEMPLATE.encode("utf-16"), "is not UTF-8 text"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        (b"{{ x }}" * 200_000, "has more than 1000000 characters"),
        (b"", "is no chat template"),
        (b'{"bos_token": "<s>"}', "is no chat template"),
        (b"a\n{% for m in messages %}{{ m.content }", "cannot be used: line 2: unexpected '}'"),
        (b"{{ " + b"[" * 5000, "cannot be used: RecursionError"),
    ],
)
def test_a_file_that_is_no_chat_template_is_refused_in_one_line(
    model_folder, train_file, tmp_path, content, said, capsys
):
    template = tmp_path / "template.jinja"
    template.write_bytes(content)
    assert main(["show", str(train_file), "--model", str(model_folder), "--chat-template", str(template)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("easydel: error: ") and str(template) in line and said in line


def test_a_byte_order_mark_is_no_part_of_a_chat_template(tmp_path):
    template = tmp_path / "template.jinja"
    template.write_bytes(b"\xef\xbb\xbf" + GOOD_TEMPLATE.replace("}{", "}\r\n{").encode())
    assert read_chat_template(str(template)) == GOOD_TEMPLATE.replace("}{", "}\n{")


@pytest.mark.parametrize("option", ["--model", "--chat-template", "--output", "--save-directory"])
def test_a_home_folder_that_nobody_has_is_refused_before_the_weights_are_loaded(
    model_folder, train_file, option, no_weights, capsys
):
    assert dpo(model_folder, train_file, option, "~nobody-here/it") == 2
    assert capsys.readouterr().err.count("\n") == 1

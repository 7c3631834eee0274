"""Flags, the configuration file, and which of them wins."""

from __future__ import annotations

import dataclasses
import os
import textwrap
from pathlib import Path

import pytest

from easydel.cli.dpo import DATA_OPTIONS, RunOptions, read_request, run_sections
from easydel.cli.failures import UsageError
from easydel.data.preference.transform import PreferenceTransform
from easydel.trainers.direct_preference_optimization_trainer.dpo_config import DPOConfig

NEEDED = ["--model", "m", "--train-dataset", "t.jsonl"]


@pytest.fixture
def config_file(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(textwrap.dedent(text), encoding="utf-8")
        return str(path)

    return write


def refusal(arguments: list[str]) -> str:
    with pytest.raises(UsageError) as refused:
        read_request(arguments)
    return str(refused.value)


def test_every_field_is_an_option_with_a_sentence_of_help():
    options = [option for section in run_sections() for option in section.options]
    names = [option.name for option in options]
    assert sorted(names) == sorted(field.name for cls in (RunOptions, DPOConfig) for field in dataclasses.fields(cls))
    assert len(set(names)) == len(names)
    assert all(len(option.help) > 10 for option in options)


def test_the_data_options_are_those_of_the_transform():
    # The tokenizer is the model's, and the time is the run's.
    assert ["tokenizer", *DATA_OPTIONS, "reads_margin", "now"] == [
        field.name for field in dataclasses.fields(PreferenceTransform)
    ]


def test_what_is_not_given_keeps_the_default():
    run, config = read_request(NEEDED)
    assert run == RunOptions(model="m", train_dataset="t.jsonl")
    assert config == DPOConfig()


def test_flags_of_every_type():
    run, config = read_request(
        [
            *NEEDED, "--learning-rate", "2e-5", "--max-length=64", "--max-prompt-length", "none", "--no-packing",
            "--share-prompt", "false", "--do-eval", "--report-to", "tensorboard", "--sharding-axis-dims", "1", "-1",
            "1", "1", "1", "--dtype", "bfloat16", "--extra-optimizer-kwargs", "b1=0.8", "eps=1e-6",
            "--chat-template-kwargs", "{enable_thinking: false}", "--tools", '{"name": "search"}',
        ]
    )  # fmt: skip
    assert (config.learning_rate, config.max_length, config.max_prompt_length) == (2e-5, 64, None)
    assert (config.packing, config.share_prompt, config.do_eval) == (False, False, True)
    assert config.report_to == ("tensorboard",)
    assert config.extra_optimizer_kwargs == {"b1": 0.8, "eps": 1e-6}
    assert config.chat_template_kwargs == {"enable_thinking": False}
    assert config.tools == [{"name": "search"}]
    assert (run.sharding_axis_dims, run.dtype) == ((1, -1, 1, 1, 1), "bfloat16")


def test_evaluation_sets_may_have_names():
    one, _ = read_request([*NEEDED, "--eval-dataset", "e.jsonl"])
    several, _ = read_request([*NEEDED, "--eval-dataset", "easy=a.jsonl", "hard=b.jsonl", "--eval-dataset", "x=c.csv"])
    assert one.eval_dataset == "e.jsonl"
    assert several.eval_dataset == {"easy": "a.jsonl", "hard": "b.jsonl", "x": "c.csv"}
    assert "a name of its own" in refusal([*NEEDED, "--eval-dataset", "easy=a.jsonl", "b.jsonl"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["a.jsonl"], "a.jsonl"),
        (["a.jsonl", "dir/step=3.jsonl"], ["a.jsonl", "dir/step=3.jsonl"]),
        (["data/a.jsonl=0.7", "s3://b/*.parquet=3e-1"], {"data/a.jsonl": 0.7, "s3://b/*.parquet": 0.3}),
        (["a=b.jsonl=2"], {"a=b.jsonl": 2.0}),
    ],
)
def test_files_to_train_on_may_have_weights(words, expected):
    run, _ = read_request(["--model", "m", "--train-dataset", *words])
    assert run.train_dataset == expected
    one_by_one = [word for file in words for word in ("--train-dataset", file)]
    assert read_request(["--model", "m", *one_by_one])[0].train_dataset == expected


def test_a_configuration_file_gives_weights_as_a_mapping(config_file):
    run, _ = read_request(["--config", config_file("model: m\ntrain_dataset: {a.jsonl: 0.7, 'b c/*.csv': 1}")])
    assert run.train_dataset == {"a.jsonl": 0.7, "b c/*.csv": 1.0}


def test_one_weight_for_two_files_is_refused():
    message = refusal(["--model", "m", "--train-dataset", "a.jsonl=1", "b.jsonl"])
    assert "--train-dataset a.jsonl=1 b.jsonl: give every value a number of its own" in message


def test_a_file_gives_options_and_flags_win_over_it(config_file):
    path = config_file("""
        model: from-file
        train_dataset: [a.jsonl, b.jsonl]
        eval_dataset: {easy: c.jsonl}
        sharding_axis_dims: [1, 1, 1, -1, 1]
        dtype: float32
        learning_rate: 1e-6
        beta: 0.3
        max_length: null
        extra_optimizer_kwargs: {eps: 1e-7}
    """)
    run, config = read_request(["--config", path, "--beta", "0.2", "--model", "from-flag"])
    assert (run.model, run.train_dataset) == ("from-flag", ["a.jsonl", "b.jsonl"])
    assert (run.eval_dataset, run.sharding_axis_dims) == ({"easy": "c.jsonl"}, (1, 1, 1, -1, 1))
    assert (config.beta, config.learning_rate, config.max_length) == (0.2, 1e-6, None)
    assert config.extra_optimizer_kwargs == {"eps": 1e-7}


def test_output_names_the_run_folder(config_file, tmp_path):
    _, config = read_request([*NEEDED, "--output", str(tmp_path / "here")])
    assert (Path(config.save_directory), config.model_name) == (tmp_path, "here")
    path = config_file("save_directory: elsewhere")
    _, config = read_request([*NEEDED, "--config", path, "--output", "here"])
    assert (config.save_directory, config.model_name) == (".", "here")
    assert "both name the run folder" in refusal([*NEEDED, "--output", "here", "--model-name", "there"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning-rte", "1"], "unknown option --learning-rte; did you mean --learning-rate?"),
        (["--learning", "1"], "unknown option --learning"),
        (["--xyzzy=1"], "unknown option --xyzzy"),
        (["--beta", "1", "stray"], 'unexpected argument "stray"'),
        (["--beta"], "--beta: expected one argument"),
        (["--beta", "abc"], "--beta abc: expected a number."),
        (["--packing=maybe"], "--packing maybe: expected true or false."),
        (["--max-length", "1.5"], "--max-length 1.5: expected a whole number or none."),
        (["--optimizer", "sgd"], "--optimizer sgd: expected one of adamw, lion, adafactor."),
        (["--sharding-axis-dims", "1", "-1"], "--sharding-axis-dims 1 -1: expected 5 values, each a whole number."),
        (["--chat-template-kwargs", "{a: "], "--chat-template-kwargs {a: : expected YAML or JSON."),
        (["--beta", "-1"], "beta=-1.0, expected a number above 0."),
        (["--warmup-steps", "3", "--warmup-ratio", "0.1"], "both set the warm-up"),
        (["--save-directory", "none"], "would throw the trained model away"),
    ],
)
def test_a_wrong_command_line_is_refused(arguments, message):
    assert message in refusal([*NEEDED, *arguments])


def test_what_must_be_given_is_named(config_file):
    assert "--model and --train-dataset must be given" in refusal([])
    assert "--train-dataset must be given" in refusal(["--config", config_file("model: m")])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("beta: 0.1\nlearning_rte: 1", "run.yaml, line 2: unknown option learning_rte; did you mean learning_rate?"),
        ("learning-rate: 1", "line 1: unknown option learning-rate; did you mean learning_rate?"),
        ("config: other.yaml", "line 1: unknown option config"),
        ("beta: abc", "run.yaml, line 1: beta='abc', expected a number."),
        ("beta:", "line 1: beta=None, expected a number."),
        ("max_length: yes", "line 1: max_length=True, expected a whole number or none."),
        ("model_name: 2024", "line 1: model_name=2024, expected text."),
        ("beta: 0.1\nbeta: 0.2", "line 2: beta is given a second time"),
        ("- beta", "holds no mapping"),
        ("beta: [", "is not valid YAML"),
        ("!!python/object:os.system {}", "is not valid YAML"),
        ("beta: 0", "beta=0.0, expected a number above 0."),
    ],
)
def test_a_wrong_file_is_refused(config_file, text, message):
    assert message in refusal([*NEEDED, "--config", config_file(text)])


def test_an_empty_file_changes_nothing_and_a_missing_one_is_refused(config_file, tmp_path):
    assert read_request([*NEEDED, "--config", config_file("# nothing yet")])[1] == DPOConfig()
    assert "cannot be read: No such file" in refusal([*NEEDED, "--config", str(tmp_path / "none.yaml")])


DEEP = "tools: " + "[" * 300 + "]" * 300
LAUGHS = "\n".join(
    ["x0: &x0 [ha, ha]", *(f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 9)}]" for n in range(1, 12)), "tools: *x11"]
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("warmup_ratio: " + "10" * 200, "line 1: warmup_ratio=1010"),
        ("max_length: " + "1" * 6000, "line 1: a number that cannot be read"),
        ("ld_alpha: !!timestamp 2001-13-45", "line 1: the tag tag:yaml.org,2002:timestamp is not valid YAML here"),
        ("beta: 2001-01-31", "line 1: beta='2001-01-31', expected a number."),
        ("max_length: 12:30:45", "line 1: max_length='12:30:45', expected a whole number or none."),
        ("beta: .nan", "line 1: beta=nan, expected a number."),
        ("learning_rate: 1e999", "line 1: learning_rate=inf, expected a number."),
        ("beta: 0.1\ntools:\n\t- a", "line 3: this is not valid YAML: found character '\\t'"),
        ("beta: 0.1\n---\nbeta: 0.2", "line 2: this is not valid YAML: but found another document"),
        ("beta: 0.1\n2024: 1", "line 2: the key 2024 is not text; put it into quotes"),
        ("eval_dataset: {on: a.jsonl}", "line 1: the key on is not text; put it into quotes"),
        ("eval_dataset:\n  a: 1.csv\n  a: 2.csv", "line 3: a is given a second time"),
        ("tools: [{a: {b: 1,\n b: 2}}]", "line 2: b is given a second time"),
        ("? [a]\n: 1", "line 1: a key is not text"),
        ("tools: !!binary aGk=", "line 1: the tag tag:yaml.org,2002:binary"),
        ("tools: !!set {a}", "line 1: the tag tag:yaml.org,2002:set"),
        ("beta: !!int x", "line 1: a number that cannot be read"),
        ("tools: &a [*a]", "nested more than 50 levels deep"),
        ("tools: *nowhere", "line 1: this is not valid YAML: found undefined alias"),
        (DEEP, "line 1: it is nested more than 50 levels deep"),
        ("[" * 5000, "it is nested too deeply"),
        (LAUGHS, "it spells out more than 20000 values, perhaps by aliases"),
        ("beta: 0.1\0", "this is not valid YAML: unacceptable character #x0000"),
        ("beta: " + "x" * (1 << 20), "bytes, expected at most 1048576"),
    ],
)
def test_a_hostile_file_is_refused_in_one_short_line(config_file, text, message):
    shown = refusal([*NEEDED, "--config", config_file(text)])
    assert message in shown and "\n" not in shown and len(shown) < 400


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("learning_rate: 1e-6", "learning_rate", 1e-6),
        ("learning_rate: 1E-6", "learning_rate", 1e-6),
        ("beta: .5", "beta", 0.5),
        ("max_length: 01000", "max_length", 1000),
        ("max_length: 1_000", "max_length", 1000),
        ("max_length: 0x400", "max_length", 1024),
        ("max_length: ~", "max_length", None),
        ("max_prompt_length: null", "max_prompt_length", None),
        ("packing: off", "packing", False),
        ("packing: Yes", "packing", True),
        ("model_name: 2024-01-31", "model_name", "2024-01-31"),
        ("model_name: 12:30:45", "model_name", "12:30:45"),
        ("model_name: 'no'", "model_name", "no"),
        ("tools: [&t {name: a}, *t]", "tools", [{"name": "a"}, {"name": "a"}]),
        ("extra_optimizer_kwargs: {eps: 1e-8}", "extra_optimizer_kwargs", {"eps": 1e-8}),
        ("\ufeffbeta: 0.3", "beta", 0.3),
    ],
)
def test_a_value_in_a_file_is_what_it_looks_like(config_file, text, name, value):
    _, config = read_request([*NEEDED, "--config", config_file(text)])
    assert getattr(config, name) == value


def test_what_is_no_readable_file_is_refused(tmp_path):
    (tmp_path / "run.yaml").write_bytes("beta: 0.1".encode("utf-16"))
    os.mkfifo(tmp_path / "pipe.yaml")
    for name, message in (
        (tmp_path, "is a folder, expected a file"),
        (tmp_path / "pipe.yaml", "is a pipe or a device, expected a file"),
        ("/dev/zero", "is a pipe or a device, expected a file"),
        (tmp_path / "run.yaml", "is UTF-16 text; save it as UTF-8"),
        ("a\0b", "cannot be read"),
        ("x" * 5000, "cannot be read"),
    ):
        assert message in refusal([*NEEDED, "--config", str(name)])


@pytest.mark.parametrize("word", ["{a: " * 400, "[" * 5000, "{a: !!python/name:os.system }", "{a: &x [*x]}"])
def test_a_hostile_value_on_the_command_line_is_refused(word):
    for option in ("--tools", "--chat-template-kwargs"):
        shown = refusal([*NEEDED, option, word])
        assert f"{option} {word[:40]}" in shown and len(shown) < 200

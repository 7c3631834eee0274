"""The documentation is true: its code runs as printed, its rows are good rows, its options exist."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

import easydel
import easydel.trainers
from easydel import DPOConfig, DPOTrainer
from easydel.cli import main
from easydel.cli.config_file import read_config_file
from easydel.cli.dpo import run_sections
from easydel.data import PreferencePair, PreferenceTransform
from tests.tiny import CHATML

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LLAMA = ROOT / "tests" / "golden" / "families" / "llama"
SPECIAL = ["<pad>", "<|im_start|>", "<|im_end|>"]
CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:;!?'-\"/()=+_\n"
FIELDS = {field.name for field in dataclasses.fields(DPOConfig)}


def tokenizer_of_a_chat_model() -> PreTrainedTokenizerFast:
    """One token a character, capitals among them, within the 96 tokens of the golden Llama."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *CHARACTERS])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"]
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def write_rows(name: str, things: str) -> None:
    rows = [
        {"prompt": f"Tell me about {thing}.", "chosen": f" {thing} is good.", "rejected": f" No idea, ask {thing}."}
        for thing in things.split()
    ]
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder_of_a_reader(tmp_path, monkeypatch) -> Path:
    """A working directory with what the pages name: a model, and files of rows."""
    model = tmp_path / "path" / "to" / "model"
    shutil.copytree(LLAMA, model, ignore=shutil.ignore_patterns("*.npz"))
    tokenizer_of_a_chat_model().save_pretrained(model)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    for name, things in (
        ("train.jsonl", "tea rain bread chess snow ink"),
        ("heldout.jsonl", "maps songs"),
        ("helpful.jsonl", "buses cats pens seas"),
        ("harmless.jsonl", "knives glue"),
    ):
        write_rows(name, things)
    return tmp_path


def run_commands(example: Example) -> None:
    """Every `easydel` command, by its own entry point; other commands need more than a test has."""
    for command in example.parsed.replace("\\\n", " ").splitlines():
        words = shlex.split(command, comments=True)
        if words[:1] == ["easydel"]:
            assert main(words[1:]) == 0, command


def read_options(example: Example) -> None:
    """A configuration file; its first line is a comment that names it."""
    name = re.match(r"# (\S+)\n", example.parsed)
    assert name is not None, "the first line of a YAML block names the file, for example: # run.yaml"
    Path(name[1]).write_text(example.parsed)
    read_config_file(name[1], {option.name: option for section in run_sections() for option in section.options})


def tokenise_rows(example: Example) -> None:
    """Rows, one a line; each must be of use."""
    transform = PreferenceTransform(tokenizer_of_a_chat_model())
    for line in example.parsed.splitlines():
        result = transform(json.loads(line))
        assert isinstance(result, PreferencePair), result


MARKDOWN = Sybil(
    [
        PythonCodeBlockParser(),
        CodeBlockParser("sh", run_commands),
        CodeBlockParser("yaml", read_options),
        CodeBlockParser("json", tokenise_rows),
    ]
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_code_of_a_page_runs_from_top_to_bottom(page, folder_of_a_reader):
    for example in MARKDOWN.parse(page).examples():
        example.evaluate()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_code_block_says_what_it_holds(page):
    known = {"python", "sh", "yaml", "json", "text", "{toctree}"}
    assert set(re.findall(r"^```(\S*)\n(?:.*\n)*?```$", page.read_text(), re.MULTILINE)) <= known


def test_every_option_is_explained_in_the_guide():
    guide = "".join(page.read_text() for page in PAGES)
    assert {field for field in FIELDS if not re.search(rf"\b{field}\b", guide)} == set()


def here_column() -> list[str]:
    """The second cell, "here", of every row of the migration page's tables."""
    page = (ROOT / "docs" / "migration.md").read_text()
    return [line.strip().strip("|").split("|")[1] for line in page.splitlines() if line.startswith("| `")]


def test_every_option_that_the_migration_tables_point_to_exists():
    arguments = set(DPOTrainer.__init__.__annotations__) | {"sharding_axis_dims", "dtype", "param_dtype"}
    cells = here_column()
    assert len(cells) > 60
    for cell in cells:
        named = re.findall(r"`([a-z]\w*)(?:=[^`]*)?`", cell)
        assert set(named) <= FIELDS | arguments, cell


def test_every_public_name_has_its_place_in_the_api_pages():
    pages = "".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    documented = set(re.findall(r"auto(?:class|function|exception):: (?:\w+\.)+(\w+)", pages))
    assert set(easydel.__all__) | set(easydel.trainers.__all__) <= documented


@pytest.mark.parametrize(
    "path",
    [path for path in sorted((ROOT / "easydel").rglob("*.py")) if ">>> " in path.read_text()],
    ids=lambda p: p.stem,
)
def test_the_examples_of_docstrings_run(path):
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    assert doctest.testmod(importlib.import_module(module)).failed == 0

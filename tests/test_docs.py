"""The documentation is true: its code runs as printed, its rows are good rows, its options exist."""

from __future__ import annotations

import ast
import dataclasses
import doctest
import importlib
import json
import re
import runpy
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

import easydel
import easydel.data
import easydel.trainers
from easydel import DPOConfig, DPOTrainer
from easydel.cli import main
from easydel.cli.dpo import run_sections
from easydel.cli.request import read_config_file
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


@pytest.mark.parametrize("page", ["objectives.md", "api/objectives.md"])
def test_the_tables_of_objectives_are_those_of_the_registry(page):
    """`python docs/write_objectives.py` writes them."""
    write_objectives = runpy.run_path(str(ROOT / "docs" / "write_objectives.py"))
    assert write_objectives["with_tables"](ROOT / "docs" / page) == (ROOT / "docs" / page).read_text()


def test_every_public_name_has_its_place_in_the_api_pages():
    pages = "".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    documented = set(re.findall(r"auto(?:class|function|exception):: (?:\w+\.)+(\w+)", pages))
    assert set(easydel.__all__) | set(easydel.trainers.__all__) <= documented


MAPS = (ROOT / "CONTRIBUTING.md", ROOT / "docs" / "one_update.md")
# A path from the root of the repository, and perhaps a name in that file.
PLACE = re.compile(
    r"`((?:easydel|tests|docs|benchmarks|examples)/[\w./-]*|[A-Z]\w+\.md|pyproject\.toml|\.ci/run)(?:::(\w+))?`"
)


@pytest.mark.parametrize("page", MAPS, ids=lambda page: page.name)
def test_every_file_and_name_that_a_map_of_the_code_mentions_exists(page):
    places = set(PLACE.findall(page.read_text()))
    assert len(places) > 20
    for path, name in places:
        assert (ROOT / path).exists(), path
        if name:
            defined = ast.parse((ROOT / path).read_text()).body
            names = {getattr(node, "name", None) for node in defined}
            names |= {
                ast.unparse(target) for node in defined if isinstance(node, ast.Assign) for target in node.targets
            }
            names |= {ast.unparse(node.target) for node in defined if isinstance(node, ast.AnnAssign)}
            assert name in names, f"{path} defines no {name}"


# An example that asks for something that no test has, with its reason; all others run.
SKIPPED: dict[str, str] = {}
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def docstrings_with_examples(module: Any) -> list[doctest.DocTest]:
    """The docstrings of a module that hold examples."""
    found = doctest.DocTestFinder(exclude_empty=True).find(module, module.__name__)
    return [docstring for docstring in found if docstring.examples]


def run_examples(docstring: doctest.DocTest, given: Mapping[str, Any]) -> None:
    """Run the examples of one docstring, in which these names are known besides those of its module.

    Raises:
      AssertionError: an output is not the one that is printed; says which.
    """
    docstring.globs = {**given, **docstring.globs}
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    assert runner.run(docstring, out=report.append).failed == 0, "".join(report)


EXAMPLES = [
    docstring
    for path in sorted((ROOT / "easydel").rglob("*.py"))
    if ">>> " in path.read_text()
    for docstring in docstrings_with_examples(
        importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    )
]


@pytest.fixture
def given_to_examples(folder_of_a_reader, tiny_model, tokenizer, rows, pairs) -> dict[str, Any]:
    """What an example may use without making it: `np`, `jnp`, the public names, and a few tiny objects.

    The working directory holds ``train.jsonl``, ``heldout.jsonl`` and a model in ``path/to/model``.
    """
    public = {name: getattr(module, name) for module in (easydel, easydel.trainers, easydel.data)
              for name in module.__all__}  # fmt: skip
    things = {"model": tiny_model, "tokenizer": tokenizer, "rows": rows, "pairs": pairs}
    return {"np": np, "jnp": jnp, "jax": jax} | public | things


@pytest.mark.parametrize("docstring", EXAMPLES, ids=lambda docstring: docstring.name)
def test_the_examples_of_docstrings_run(docstring, given_to_examples):
    if docstring.name in SKIPPED:
        pytest.skip(SKIPPED[docstring.name])
    run_examples(docstring, given_to_examples)


@pytest.mark.parametrize("docstring", EXAMPLES, ids=lambda docstring: docstring.name)
def test_the_examples_of_docstrings_can_fail(docstring):
    assert any(example.want for example in docstring.examples), "no output is compared"
    for example in docstring.examples:
        assert not example.options.get(doctest.SKIP), f"line {example.lineno}: a skipped example proves nothing"


def test_every_skipped_example_exists():
    assert SKIPPED.keys() <= {docstring.name for docstring in EXAMPLES}


def example_of(docstring: str) -> doctest.DocTest:
    return doctest.DocTestParser().get_doctest(docstring, {}, "made", None, 0)


@pytest.mark.parametrize("wrong", [">>> 1 + 1\n3\n", ">>> given\n0\n", ">>> unknown\n1\n", ">>> 1 / 0\n"])
def test_an_example_with_a_wrong_output_fails(wrong):
    run_examples(example_of(">>> given + 1\n2\n"), {"given": 1})
    with pytest.raises(AssertionError, match=r"Failed example"):
        run_examples(example_of(wrong), {"given": 1})

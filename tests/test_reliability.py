"""The page of promises is true: every test that it names exists, and every target is fuzzed."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.fuzz.targets import TARGETS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "reliability.md").read_text()
PROMISES = re.findall(r"^\| (?!promise|-)(.+?) \| (.*?) \|$", PAGE, re.MULTILINE)


@pytest.mark.parametrize(("promise", "named"), PROMISES, ids=lambda value: value[:60])
def test_every_promise_names_a_test_that_exists(promise, named):
    file, function = re.fullmatch(r"`(tests/[\w/]+\.py)::(test_\w+)`", named).groups()
    assert (ROOT / file).is_file(), file
    tree = ast.parse((ROOT / file).read_text())
    assert function in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, named


def test_there_are_promises_and_targets():
    assert len(PROMISES) > 30
    assert len(TARGETS) > 20

"""Rules of the house that a test can watch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import easydel
import easydel.trainers

PACKAGE = Path(easydel.__file__).parent

# Part -> the other parts it may import. Everything else must not be known to it.
ALLOWED = {
    "data": set(),
    "ops": set(),
    "infra": {"ops"},
    "modules": {"infra", "ops"},
    "trainers": {"infra", "data", "ops"},
    "cli": {"trainers", "modules", "infra", "data"},
}


def imported_modules(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module)
    return names


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_point_one_way(part):
    allowed = ALLOWED[part] | {part}
    for path in (PACKAGE / part).rglob("*.py"):
        ours = {name.split(".")[1] for name in imported_modules(path) if name.startswith("easydel.")}
        assert ours <= allowed, f"{path.relative_to(PACKAGE)} imports {ours - allowed}"


def test_data_never_imports_jax_and_nothing_imports_torch():
    for path in PACKAGE.rglob("*.py"):
        roots = {name.split(".")[0] for name in imported_modules(path)}
        assert "torch" not in roots, path
        if "data" in path.relative_to(PACKAGE).parts:
            assert not roots & {"jax", "equinox", "optax"}, path


def test_importing_easydel_is_quick_and_starts_no_backend():
    code = (
        "import sys, time; start = time.perf_counter(); import easydel; seconds = time.perf_counter() - start; "
        "heavy = {'jax', 'transformers', 'datasets', 'torch'} & sys.modules.keys(); print(seconds, sorted(heavy))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    seconds, heavy = output.split(maxsplit=1)
    assert float(seconds) < 0.5
    assert heavy.strip() == "[]"


def test_every_public_name_can_be_imported():
    for module in (easydel, easydel.trainers):
        assert set(module.__all__) == module._PUBLIC.keys()
        for name in module.__all__:
            assert getattr(module, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'DPOTrayner'"):
        _ = easydel.DPOTrayner

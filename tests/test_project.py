"""Rules of the house that a test can watch."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import easydel
import easydel.trainers
from tests.import_graph import circles, forbidden_imports, import_graph, imported_names, modules, relative_imports, room

PACKAGE = Path(easydel.__file__).parent
ROOT = PACKAGE.parent
GRAPH = import_graph(PACKAGE)
DPO = "easydel.trainers.direct_preference_optimization_trainer"

# Room -> the rooms it may import; everything else must not be known to it. A room is a folder, or a file that others
# may know although they may not know its folder. The facades only pass names on.
FACADES = {"easydel", "easydel.data", "easydel.trainers"}
BASE = {"easydel.errors", "easydel.paths", "easydel.plain_yaml", "easydel.option_types", "easydel.options"}
DATA = {"easydel.data.faults", "easydel.data.tree"}
# The documented paths of the model and its state stand in infra, and above all that they make easy.
MODULE = {"easydel.infra.base_module", "easydel.infra.base_state"}
# Every model has one of these: how its arrays are named in files, and nothing about the files themselves.
WEIGHT_MAP = {"easydel.weights.weight_map"}
MODEL = {"easydel.ops", "easydel.layers", "easydel.weights", "easydel.infra"} | MODULE | WEIGHT_MAP
ROWS = {"easydel.data.sources", "easydel.data.preference", "easydel.data.batching"}
# The files of the loop itself; `trainer.py` stands above all that it runs.
TRAINING = {"easydel.trainers", "easydel.trainers.callbacks", "easydel.trainers.run", "easydel.trainers.trainer"}
ALLOWED: dict[str, set[str]] = {
    "easydel": set(),
    "easydel.data": set(),
    "easydel.errors": set(),
    "easydel.paths": set(),
    "easydel.plain_yaml": {"easydel.errors"},
    "easydel.option_types": {"easydel.plain_yaml"},
    "easydel.options": {"easydel.option_types"},
    "easydel.data.faults": {"easydel.errors"},
    "easydel.data.tree": set(),
    "easydel.data.sources": BASE | DATA,
    "easydel.data.preference": BASE | DATA,
    "easydel.data.batching": BASE | DATA | {"easydel.data.sources", "easydel.data.preference"},
    "easydel.ops": set(),
    "easydel.weights.weight_map": set(),
    "easydel.infra": BASE | WEIGHT_MAP | {"easydel.ops"},
    "easydel.layers": BASE | {"easydel.ops", "easydel.infra"},
    "easydel.weights": BASE | WEIGHT_MAP | {"easydel.infra", "easydel.layers"},
    "easydel.tokenizer": BASE | {"easydel.infra", "easydel.weights"},
    "easydel.inference": BASE | {"easydel.infra", "easydel.ops"},
    "easydel.infra.base_state": BASE | {"easydel.infra", "easydel.layers"},
    "easydel.infra.base_module": BASE | MODEL | {"easydel.inference"},
    "easydel.modules": BASE | MODEL,
    "easydel.trainers.callbacks": BASE | MODULE,
    "easydel.trainers": BASE | MODEL | {"easydel.trainers.callbacks"},
    "easydel.trainers.run": BASE | MODEL | {"easydel.trainers.callbacks", "easydel.trainers"},
    "easydel.trainers.trainer": BASE | MODEL | TRAINING - {"easydel.trainers.trainer"} | {"easydel.tokenizer"},
    f"{DPO}.objectives": BASE,
    f"{DPO}.scoring": BASE | MODEL | TRAINING,
    f"{DPO}.reference": BASE | MODEL | TRAINING | {"easydel.data.batching", f"{DPO}.scoring"},
    DPO: BASE | MODEL | TRAINING | DATA | ROWS
    | {"easydel.inference", "easydel.tokenizer", f"{DPO}.objectives", f"{DPO}.scoring", f"{DPO}.reference"},
    "easydel.cli": {"easydel"} | BASE | MODEL | TRAINING | DATA | ROWS
    | {"easydel.modules", "easydel.tokenizer", DPO, f"{DPO}.objectives", f"{DPO}.reference"},
    "easydel.__main__": {"easydel.cli"},
}  # fmt: skip


def test_imports_point_one_way():
    inside = {module: others for module, others in GRAPH.items() if module not in FACADES}
    assert forbidden_imports(inside, ALLOWED) == []


def test_the_rooms_themselves_are_in_one_order():
    assert circles(ALLOWED) == []


def test_every_file_stands_in_a_room():
    outside = {module for module in GRAPH if room(module, ALLOWED.keys()) in FACADES - {"easydel.trainers"}}
    assert outside <= FACADES


def test_no_import_goes_in_a_circle():
    assert circles(GRAPH) == []


def test_every_import_names_its_module_in_full():
    sources = [
        path for folder in ("easydel", "tests", "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py")
    ]
    by_dots = [f"{path.relative_to(ROOT)}, line {line}" for path in sources for line in relative_imports(path)]
    assert by_dots == []


def test_data_never_imports_jax_and_nothing_imports_torch():
    for module, path in modules(PACKAGE).items():
        roots = {name.split(".")[0] for name in imported_names(path, module)}
        assert "torch" not in roots, path
        if module.startswith("easydel.data"):
            assert not roots & {"jax", "equinox", "optax"}, path


# What the rules above are for, each in a package made for it: file -> what it holds.
HARMLESS = {"low/__init__.py": "", "low/a.py": "import json\n", "high/__init__.py": "", "high/b.py": ""}
PLANTED = {
    "absolute": {"low/a.py": "import house.high.b\n"},
    "from a package": {"low/a.py": "from house.high import b\n"},
    "of a name": {"low/a.py": "from house.high.b import name\n"},
    "relative": {"low/a.py": "from ..high.b import name\n"},
    "relative, of a module": {"low/a.py": "from ..high import b\n"},
    "in a package": {"low/__init__.py": "from ..high.b import name\n"},
    "in a function": {"low/a.py": "def run():\n    from house.high.b import name\n"},
    "for annotations": {
        "low/a.py": "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    from house.high.b import name\n"
    },
}


def plant(folder: Path, files: dict[str, str]) -> Path:
    """A package `house` of these files."""
    package = folder / "house"
    for name, content in ({"__init__.py": ""} | HARMLESS | files).items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(content)
    return package


@pytest.mark.parametrize("files", PLANTED.values(), ids=PLANTED)
def test_a_forbidden_import_is_seen_however_it_is_written(files, tmp_path):
    rooms = {"house": set(), "house.low": set(), "house.high": {"house.low"}}
    assert forbidden_imports(import_graph(plant(tmp_path / "good", {})), rooms) == []
    graph = import_graph(plant(tmp_path / "bad", files))
    (found,) = forbidden_imports(graph, rooms)
    assert found.startswith("house.low") and found.endswith(" imports house.high.b")
    assert forbidden_imports(graph, rooms | {"house.low": {"house.high"}}) == []


def test_a_circle_is_seen_even_where_it_closes_for_annotations_alone(tmp_path):
    files = {"high/b.py": "from house.low.a import name\n"}
    assert circles(import_graph(plant(tmp_path / "good", files))) == []
    for kind, back in PLANTED.items():
        if kind == "in a package":
            continue  # it closes no circle: the package is another module than the file in it
        found = circles(import_graph(plant(tmp_path / kind, files | back)))
        assert found == [{"house.low.a", "house.high.b"}], kind


def test_circles_are_told_apart():
    graph = {"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": {"e"}, "e": {"d"}, "f": {"a", "e"}}
    assert sorted(map(sorted, circles(graph))) == [["a", "b", "c"], ["d", "e"]]


def test_an_import_by_dots_is_seen(tmp_path):
    package = plant(tmp_path, {"low/a.py": "import json\nfrom .. import high\n"})
    assert relative_imports(package / "low" / "a.py") == [2]
    assert relative_imports(package / "high" / "b.py") == []


def private_reads(source: str) -> list[str]:
    """The private attributes that a source reads of other objects, imports or names for patching.

    What a class reads of itself (``self``, ``cls``, ``super()``) is its own business.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and not is_own(node.value):
            found.append(node.attr)
        elif isinstance(node, ast.ImportFrom):
            found += [alias.name for alias in node.names if is_private(alias.name)]
        elif isinstance(node, ast.Call) and called_name(node) in ("setattr", "getattr", "delattr", "patch"):
            words = [word.value for word in node.args if isinstance(word, ast.Constant) and isinstance(word.value, str)]
            found += [name for word in words for name in word.split(".") if is_private(name)]
    return found


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def is_own(value: ast.expr) -> bool:
    return ast.unparse(value) in ("self", "cls", "super()")


def called_name(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


# `os._exit` ends a child without running its parent's exit handlers; `jax._src` holds what only a GPU would answer.
# A named tuple's methods begin with a line to keep clear of its fields.
NOT_OURS = {"_exit", "_src", "_asdict", "_replace"}


def test_tests_read_no_private_attribute():
    tests = ROOT / "tests"
    read = {
        str(path.relative_to(tests)): set(private_reads(path.read_text())) - NOT_OURS for path in tests.rglob("*.py")
    }
    assert {name: names for name, names in read.items() if names} == {}


@pytest.mark.parametrize(
    "source",
    [
        "trainer._state",
        "trainer.state._cache.size",
        "from easydel.paths import _home",
        "monkeypatch.setattr(trainer, '_step', None)",
        "monkeypatch.setattr('easydel.paths._home', None)",
        "getattr(trainer, '_state')",
    ],
)
def test_a_private_attribute_is_seen(source):
    assert len(private_reads(source)) == 1


@pytest.mark.parametrize("source", ["self._state", "super()._row(index)", "trainer.__class__", "from a import b"])
def test_what_is_public_or_an_objects_own_is_allowed(source):
    assert private_reads(source) == []


def test_importing_easydel_is_quick_and_starts_no_backend():
    code = (
        "import sys, time; start = time.perf_counter(); import easydel; seconds = time.perf_counter() - start; "
        "heavy = {'jax', 'transformers', 'datasets', 'torch'} & sys.modules.keys(); print(seconds, sorted(heavy))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    seconds, heavy = output.split(maxsplit=1)
    assert float(seconds) < 0.5
    assert heavy.strip() == "[]"


@pytest.mark.parametrize("module", [easydel, easydel.trainers], ids=lambda module: module.__name__)
def test_every_public_name_can_be_imported(module):
    assert list(module.__all__) == sorted(module.__all__)
    assert set(module.__all__) <= set(dir(module))
    for name in module.__all__:
        assert getattr(module, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'DPOTrayner'"):
        _ = module.DPOTrayner


@pytest.mark.parametrize("module", [easydel, easydel.trainers], ids=lambda module: module.__name__)
def test_type_checkers_see_the_names_that_load_on_first_use(module):
    (block,) = [node for node in ast.parse(Path(module.__file__).read_text()).body if isinstance(node, ast.If)]
    seen = [alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert set(module.__all__) == set(seen)


def test_workflow_and_package_name_the_same_pythons():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    prefix = "Programming Language :: Python :: "
    named = [name.removeprefix(prefix) for name in project["project"]["classifiers"] if name.startswith(prefix)]
    assert jobs["test"]["strategy"]["matrix"]["python"] == named
    assert {"run": ".ci/run"} in jobs["test"]["steps"]


def test_the_package_says_that_it_is_typed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert (PACKAGE / "py.typed").read_text() == ""
    assert project["tool"]["setuptools"]["package-data"] == {"easydel": ["py.typed"]}


def test_citation_changelog_and_package_name_the_same_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["version"] == easydel.__version__
    assert citation["license"] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license"]
    assert f"## [{easydel.__version__}]" in (ROOT / "CHANGELOG.md").read_text()

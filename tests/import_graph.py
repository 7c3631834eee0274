"""Which file of a package imports which, as the source says it: at module level, in functions, for annotations."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Set
from pathlib import Path

Graph = Mapping[str, Set[str]]


def modules(package: Path) -> dict[str, Path]:
    """The file of every module of a package, by dotted name; a package goes by its own name."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def relative_imports(path: Path) -> list[int]:
    """The lines of a file that import by dots."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return [node.lineno for node in nodes if isinstance(node, ast.ImportFrom) and node.level]


def imported_names(path: Path, module: str) -> Iterator[str]:
    """Every dotted name that a file imports, of this package and of others; relative ones are resolved.

    ``from a.b import c`` yields ``a.b.c``, which may be a module or something in ``a.b``.
    """
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *filter(None, [node.module])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def import_graph(package: Path) -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports, wherever in the file and for whatever purpose."""
    known = modules(package)
    graph: dict[str, set[str]] = {}
    for module, path in known.items():
        named = (nearest_module(name, known) for name in imported_names(path, module))
        graph[module] = {name for name in named if name is not None and name != module}
    return graph


def nearest_module(name: str, known: Mapping[str, Path]) -> str | None:
    """The module that a dotted name is, or is in; None for one of another package."""
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name or None


def circles(graph: Graph) -> list[set[str]]:
    """The modules that reach themselves through others, those of one circle together: strong components (Tarjan)."""
    numbers: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(module: str) -> None:
        numbers[module] = lowest[module] = len(numbers)
        stack.append(module)
        for other in graph[module]:
            if other not in numbers:
                visit(other)
                lowest[module] = min(lowest[module], lowest[other])
            elif other in stack:
                lowest[module] = min(lowest[module], numbers[other])
        if lowest[module] == numbers[module]:
            component = set(stack[stack.index(module) :])
            del stack[stack.index(module) :]
            if len(component) > 1:
                found.append(component)

    for module in graph:
        if module not in numbers:
            visit(module)
    return found


def room(module: str, rooms: Set[str]) -> str:
    """The innermost of the rooms that a module stands in.

    Raises:
      KeyError: it stands in none of them.
    """
    name = module
    while name not in rooms:
        name = name.rpartition(".")[0]
        if not name:
            raise KeyError(module)
    return name


def forbidden_imports(graph: Graph, allowed: Graph) -> list[str]:
    """The imports, as "a imports b", that lead from one room into another that it may not know."""
    rooms = allowed.keys()
    return sorted(
        f"{module} imports {other}"
        for module, others in graph.items()
        for other in others
        if (here := room(module, rooms)) != (there := room(other, rooms)) and there not in allowed[here]
    )

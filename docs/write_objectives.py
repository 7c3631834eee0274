"""Write the tables of objectives and of their options into the pages that show them.

    python docs/write_objectives.py

What stands between a mark such as ``<!-- objectives -->`` and the next ``<!-- end -->`` comes from the registry.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import get_args, get_type_hints

from easydel.trainers.direct_preference_optimization_trainer.objectives.objective import (
    OBJECTIVES,
    Objective,
    option_fields,
    owners,
)

GUIDE, REFERENCE = Path(__file__).parent / "objectives.md", Path(__file__).parent / "api" / "objectives.md"
DIVERGENCE = "f_divergence_type", "f_alpha_divergence_coef"


def names_of() -> dict[type[Objective], list[str]]:
    """Map every objective to its names; `sigmoid`, the default, first, then by name."""
    names: dict[type[Objective], list[str]] = {}
    for name, objective in sorted(OBJECTIVES.items(), key=lambda entry: (entry[0] != "sigmoid", entry[0])):
        names.setdefault(objective, []).append(name)
    return names


def summary(objective: type[Objective]) -> str:
    """Return the first line of an objective's docstring, without its full stop."""
    return inspect.getdoc(objective).splitlines()[0].removesuffix(".")


def table_of_objectives() -> str:
    lines = ["| `loss_type` | what it is | options | needs | from |", "|---|---|---|---|---|"]
    for objective, names in names_of().items():
        options = [field.name for field in dataclasses.fields(objective)]
        shown = [f"`{name}`" for name in options if name not in DIVERGENCE] + ["f"] * (DIVERGENCE[0] in options)
        needs = {
            "a reference": objective.needs_reference,
            "the whole update": objective.needs_whole_update,
            "a column `margin`": objective.needs_margin,
        }
        cells = (
            ", ".join(f"`{name}`" for name in names),
            summary(objective),
            ", ".join(shown) or "–",
            ", ".join(need for need, is_needed in needs.items() if is_needed) or "–",
            objective.paper,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def table_of_options() -> str:
    lines = ["| option | default | range | meaning | of |", "|---|---|---|---|---|"]
    for name, field in sorted(option_fields().items()):
        own = owners(name)
        names = get_args(get_type_hints(OBJECTIVES[own[0]])[name])
        span = ", ".join(f"`{one}`" for one in names) or field.metadata.get("within", "any number")
        of = ", ".join(f"`{owner}`" for owner in own) if len(own) <= 7 else "most"
        lines.append(f"| `{name}` | `{field.default!r}` | {span} | {field.metadata['help'].removesuffix('.')} | {of} |")
    return "\n".join(lines)


def classes() -> str:
    entries = [f".. autoclass:: {kind.__module__}.{kind.__name__}()\n   :members:" for kind in names_of()]
    return "```{eval-rst}\n" + "\n\n".join(entries) + "\n```"


def with_tables(page: Path) -> str:
    """Return the text of a page with its tables filled from the registry."""
    tables = {"objectives": table_of_objectives, "options": table_of_options, "classes": classes}
    return re.sub(
        r"<!-- (\w+) -->\n.*?\n<!-- end -->",
        lambda mark: f"<!-- {mark[1]} -->\n\n{tables[mark[1]]()}\n\n<!-- end -->",
        page.read_text(),
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    for path in (GUIDE, REFERENCE):
        path.write_text(with_tables(path))

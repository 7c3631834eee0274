"""Put the tables of benchmarks/results into the pages that show them.

    python -m benchmarks.write_tables

A page says where: between ``<!-- table headline_mixed -->`` and ``<!-- end of table -->`` comes the table of
results/headline_mixed.json, after ``<!-- summary headline_mixed -->`` the few columns of it that most readers want.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from benchmarks.suite.result_tables import SUMMARIES, TABLES

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
PAGES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md")
PLACE = re.compile(
    r"(?P<mark><!-- (?P<form>table|summary) (?P<name>\w+) -->\n).*?(?P<end><!-- end of table -->)", re.DOTALL
)


def table_of(form: str, name: str, results: Path = RESULTS) -> str:
    """The table of a result file, or that there is none yet."""
    file = results / f"{name}.json"
    if not file.is_file():
        return "Not measured yet."
    tables = TABLES if form == "table" else SUMMARIES
    return tables[name.partition("_")[0]](json.loads(file.read_text()))


def with_tables(page: str, results: Path = RESULTS) -> str:
    """The text of a page with every table as its result file has it."""
    return PLACE.sub(
        lambda place: f"{place['mark']}\n{table_of(place['form'], place['name'], results)}\n\n{place['end']}", page
    )


def main() -> None:
    for page in PAGES:
        page.write_text(with_tables(page.read_text()))


if __name__ == "__main__":
    main()

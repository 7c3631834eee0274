"""Put the tables of benchmarks/results into the pages that show them; no number in them is typed by hand.

    python -m benchmarks.tables

A page says where: between ``<!-- table headline_mixed -->`` and ``<!-- end of table -->`` comes the table of
results/headline_mixed.json, after ``<!-- summary headline_mixed -->`` the few columns of it that most readers want.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.harness import RESULTS, matmul_rate
from benchmarks.measurement import was_held_up
from benchmarks.summary import Run, Summary, ratios, spread, steady_updates, summarise

Result = Mapping[str, Any]
ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md")
PLACE = re.compile(
    r"(?P<mark><!-- (?P<form>table|summary) (?P<name>\w+) -->\n).*?(?P<end><!-- end of table -->)", re.DOTALL
)
BASELINES = ("TRL", "TRL, reference precomputed", "EasyDeL 0.3.0, 2 pairs an update")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def held_up(runs: Sequence[Run]) -> list[str]:
    """The contenders of which a run was paused or disturbed."""
    return list(
        dict.fromkeys(run["contender"] for run in runs if any(was_held_up(update) for update in run.get("updates", [])))
    )


def runs_by_contender(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of every contender that never failed and was never held up, in the order of rounds."""
    out = {run["contender"] for run in runs if "failure" in run} | set(held_up(runs))
    names = [name for name in dict.fromkeys(run["contender"] for run in runs) if name not in out]
    return {name: [run for run in runs if run["contender"] == name] for name in names}


def headline_summaries(result: Result) -> dict[str, Summary]:
    """Every contender over the updates that none of those on the same task warmed up in."""
    contenders = runs_by_contender(result["runs"])
    summaries = {}
    for name, runs in contenders.items():
        pairs = runs[0]["pairs"]
        same_task = [run for others in contenders.values() for run in others if run["pairs"] == pairs]
        steady = steady_updates(same_task)
        if not steady:
            raise ValueError(f"{result['set']}: every update of {pairs} pairs warmed something up; make more updates.")
        known = [run["updates"] for run in same_task if run["trainer"] == "ours"]
        flops = [update["forward_flops"] for update in known[0]] if known else []
        summaries[name] = summarise(runs, steady, flops)
    return summaries


def comparison(result: Result, summaries: Mapping[str, Summary]) -> Callable[[str, str, str, int], str]:
    """(contender, peer, number of `Summary`, digits) -> their ratio, where both made updates of the same pairs."""
    pairs = {run["contender"]: run["pairs"] for run in result["runs"]}

    def beside(name: str, base: str, number: str, digits: int) -> str:
        if not {name, base} <= summaries.keys() or pairs[name] != pairs[base]:
            return ""
        return spread(ratios(vars(summaries[name])[number], vars(summaries[base])[number]), digits)

    return beside


def headline_table(result: Result) -> str:
    """One row a contender: speed, memory, start, and what of the machine's arithmetic is used."""
    summaries = headline_summaries(result)
    beside = comparison(result, summaries)
    rate = matmul_rate(result["matmul"])
    baselines = [name for name in BASELINES if name in summaries]

    columns = ["trainer", "s an update", "pairs a second", *(f"speed, {name} = 1" for name in baselines)]
    columns += ["peak memory, GB", *(f"memory, {name} = 1" for name in baselines)]
    columns += ["first update done after, s", "reference before that, s", "compiling in all, s", "padding"]
    columns += ["share of the matmul rate", "last loss"]
    rows = []
    for name, one in summaries.items():
        rows.append(
            [
                name,
                spread(one.seconds, 1),
                spread(one.pairs_per_second, 2),
                *(beside(name, base, "pairs_per_second", 2) for base in baselines),
                f"{median(one.peak_memory) / 1e9:.2f}",
                *(beside(name, base, "peak_memory", 2) for base in baselines),
                spread(one.first_update, 0),
                spread(one.reference, 0) if one.reference else "",
                spread(one.compiling, 0) if any(one.compiling) else "",
                f"{median(one.padding):.0%}" if one.padding else "",
                f"{median(one.flops_per_second) / rate:.0%}" if one.flops_per_second else "",
                f"{one.last_loss:.4f}",
            ]
        )
    tokens = result["tokens"]
    mean = [sum(update[part] for update in tokens) / result["rows"] for part in range(3)]
    notes = (
        f"{result['updates']} updates of {result['pairs']} pairs, rounds: {len(result['matmul']) - 1}; rows of "
        f"{' and '.join(result['files'])}, on average {mean[0]:.0f} tokens of prompt, {mean[1]:.0f} chosen, "
        f"{mean[2]:.0f} rejected. {result['machine']['cores']} cores of {result['machine']['processor']}, float32; "
        f"large matrix products run at {rate / 1e9:.0f} GFLOP/s."
    )
    variables = result["machine"].get("variables", {})
    notes += "".join(f" {name}={value} for all." for name, value in variables.items())
    notes += "".join(f" {what}." for what in result["disagreements"])
    if names := held_up(result["runs"]):
        notes += f" Left out, because other work on the machine held them up: {'; '.join(names)}."
    return f"{table(columns, rows)}\n\n{notes}"


def headline_summary(result: Result) -> str:
    """Speed and memory beside the peer that does the same work."""
    summaries = headline_summaries(result)
    beside = comparison(result, summaries)
    rows = []
    for name, one in summaries.items():
        cells = [name, spread(one.pairs_per_second, 2), f"{median(one.peak_memory) / 1e9:.1f}"]
        for base in BASELINES[:2]:
            cells += [beside(name, base, "pairs_per_second", 1), beside(name, base, "peak_memory", 2)]
        rows.append(cells)
    columns = ["trainer", "pairs a second", "peak memory, GB"]
    columns += [f"{what}, {base} = 1" for base in BASELINES[:2] for what in ("speed", "memory")]
    return table(columns, rows)


def switches_table(result: Result) -> str:
    """One row a switch: what turning it off costs."""
    runs = {run["contender"]: run for run in result["runs"] if "failure" not in run}
    on = runs[result["all_on"]]
    rows = []
    for name, off in runs.items():
        if name == result["all_on"]:
            continue
        steady = steady_updates([on, off])
        if not steady:
            raise ValueError(f"switches: every update without {name} warmed something up; make more updates.")
        with_it, without = (median(run["updates"][number]["seconds"] for number in steady) for run in (on, off))
        rows.append(
            [
                name,
                f"{with_it:.1f}",
                f"{without:.1f}",
                f"{without / with_it:.2f}",
                f"{on['peak_memory'] / 1e9:.2f}",
                f"{off['peak_memory'] / 1e9:.2f}",
                f"{off['peak_memory'] / on['peak_memory']:.2f}",
            ]
        )
    columns = ["switch", "s an update with it", "without", "gain", "peak memory with it, GB", "without", "gain"]
    return table(columns, rows)


def generated_table(result: Result) -> str:
    """One row a point: ours beside TRL, over the updates in which neither warmed up."""
    rows = []
    for name, point in result["points"].items():
        summaries = headline_summaries({"set": name} | point)
        beside = comparison(point, summaries)
        missing = {run["contender"]: run.get("failure", "held up") for run in point["runs"]}
        cells = [name]
        for contender in ("ours", "TRL"):
            one = summaries.get(contender)
            cells.append(missing[contender] if one is None else spread(one.seconds, 2))
        cells.append(beside("ours", "TRL", "pairs_per_second", 1))
        cells += [f"{run['peak_memory'] / 1e9:.2f}" if "peak_memory" in run else "" for run in point["runs"]]
        cells.append(beside("ours", "TRL", "peak_memory", 2))
        rows.append(cells)
    columns = ["what", "ours, s an update", "TRL", "speed, TRL = 1", "ours, peak memory, GB", "TRL", "memory, TRL = 1"]
    return table(columns, rows)


# Start of a result file's name -> its table, and the short form of it.
TABLES: dict[str, Callable[[Result], str]] = {
    "headline": headline_table,
    "switches": switches_table,
    "generated": generated_table,
}
SUMMARIES: dict[str, Callable[[Result], str]] = {"headline": headline_summary}


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

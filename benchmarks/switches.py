"""What each switch brings: all of them on, and one after the other off, on real rows with SmolLM2-135M-Instruct.

    python -m benchmarks.switches

Every run is a process of its own. Compiled programs and reference log-probs are kept between the runs, but for the run
whose reference is not cached. Writes results/switches.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.headline import in_short
from benchmarks.suite import machine
from benchmarks.suite.agreement import hold_ups
from benchmarks.suite.contenders import Contender, Task, run
from benchmarks.suite.model_folder import write_model_folder
from benchmarks.suite.rows import DATA, SETS, choose, write_rows

RESULTS = Path(__file__).parent / "results"
CACHED = {"precompute_ref_log_probs": True}
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
ALL_ON = Contender("all on", "ours", CACHED, cache="shared", environment=HUGE_PAGES)
# The name of a switch, and a run without it.
SWITCHES = (
    Contender("packing", "ours", CACHED | {"packing": False}, cache="shared", environment=HUGE_PAGES),
    Contender("shared prompt", "ours", CACHED | {"share_prompt": False}, cache="shared", environment=HUGE_PAGES),
    Contender("cached reference", "ours", environment=HUGE_PAGES),
    Contender(
        "layers rebuilt",
        "ours",
        CACHED | {"gradient_checkpointing": False},
        cache="shared",
        environment=HUGE_PAGES,
    ),
    Contender("huge pages", "ours", CACHED, cache="shared"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=SETS, default="mixed")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the sets' files")
    parser.add_argument("--switches", nargs="+", choices=[switch.name for switch in SWITCHES])
    parser.add_argument("--pairs", type=int, default=16, help="of one update")
    parser.add_argument("--updates", type=int, default=6)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder")
    arguments = parser.parse_args()
    files = [arguments.data / file for file in SETS[arguments.set]]
    if missing := [file for file in files if not file.is_file()]:
        parser.error(f"there is no {missing[0]}; give the folder of the data with --data.")
    names = arguments.switches or [switch.name for switch in SWITCHES]
    result: dict[str, Any] = {
        "all_on": ALL_ON.name,
        "machine": machine.describe(),
        "pairs": arguments.pairs,
        "runs": [],
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="easydel-switches-") as name:
        folder = Path(name)
        tokenizer = write_model_folder(folder / "model")
        rows, _ = choose(files, arguments.pairs * arguments.updates, tokenizer, arguments.max_length)
        write_rows(rows, folder / "rows.jsonl")
        task = Task(
            folder / "rows.jsonl", folder / "model", arguments.max_length, arguments.pairs, arguments.updates, 1e-5
        )
        shared = folder / "cache"
        shared.mkdir()
        # The first run fills the cache and is not counted.
        for number, contender in enumerate((ALL_ON, ALL_ON, *(one for one in SWITCHES if one.name in names))):
            measured = run(contender, task, {"ours": sys.executable}, shared if contender.cache else None)
            print(f"{contender.name}: {in_short(measured)}", flush=True)
            if number > 0:
                result["runs"].append(measured)
    wrong = hold_ups(result)
    (arguments.output / "switches.json").write_text(json.dumps(result, indent=1) + "\n")
    if wrong:
        raise SystemExit("the results are not to be used:\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()

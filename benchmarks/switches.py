"""What each switch brings: all of them on, and one after the other off.

    python -m benchmarks.switches                                  # SmolLM2-135M-Instruct on real rows, on the CPU
    python -m benchmarks.switches --platform cuda --shape 0.5b     # a random Qwen2-like model on made rows, on a GPU

Every run is a process of its own. Compiled programs and reference log-probs are kept between the runs, but for the run
whose reference is not cached. Writes results/switches.json, or results/switches_<platform>.json.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.checks import failures, hold_ups
from benchmarks.harness import Contender, command_line, describe_machine, end, in_short, real_task, run, write_result
from benchmarks.made import SHAPES, made_task
from benchmarks.rows import SETS

CACHED = {"precompute_ref_log_probs": True}
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def ours(name: str, environment: dict[str, str] = HUGE_PAGES, **options: Any) -> Contender:
    """A run of ours that finds the reference's log-probs cached."""
    return Contender(name, "ours", CACHED | options, cache="shared", environment=environment)


ALL_ON = ours("all on")
# The name of a switch, and a run without it.
SWITCHES = (
    ours("packing", packing=False),
    ours("shared prompt", share_prompt=False),
    Contender("cached reference", "ours", environment=HUGE_PAGES),
    ours("layers rebuilt", gradient_checkpointing=False),
    ours("huge pages", environment={}),
)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--set", choices=SETS, default="mixed")
    parser.add_argument("--shape", choices=SHAPES, help="a random model on made rows instead")
    parser.add_argument("--platform", choices=["cpu", "cuda", "tpu"], default="cpu")
    parser.add_argument("--switches", nargs="+", choices=[switch.name for switch in SWITCHES])
    arguments = parser.parse_args()
    chosen = [one for one in SWITCHES if one.name in (arguments.switches or [switch.name for switch in SWITCHES])]
    result: dict[str, Any] = {
        "all_on": ALL_ON.name,
        "machine": describe_machine(),
        "pairs": arguments.pairs,
        "runs": [],
    }
    with tempfile.TemporaryDirectory(prefix="easydel-switches-") as name:
        folder = Path(name)
        if arguments.shape is None:
            task, _, _ = real_task(folder, arguments.set, arguments)
        else:
            task, _ = made_task(folder, SHAPES[arguments.shape], arguments.pairs, arguments.updates, arguments.platform)
        shared = folder / "cache"
        shared.mkdir()
        # The first run fills the cache and is not counted.
        for number, contender in enumerate((ALL_ON, ALL_ON, *chosen)):
            measured = run(contender, task, {"ours": sys.executable}, shared if contender.cache else None)
            print(f"{contender.name}: {in_short(measured)}", flush=True)
            if number > 0:
                result["runs"].append(measured)
    of_platform = "" if arguments.platform == "cpu" else f"_{arguments.platform}"
    write_result(result, arguments.output, f"switches{of_platform}")
    end(failures(result) + hold_ups(result))


if __name__ == "__main__":
    main()

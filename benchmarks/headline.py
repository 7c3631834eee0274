"""SmolLM2-135M-Instruct trained on the same real rows by us and by peers: time, memory, first update.

    python -m benchmarks.headline --trl-python <interpreter with golden/requirements.txt>

Every contender starts with empty caches; rounds go through all contenders before the next one begins. Losses must agree
and nothing may be held up, or the command fails; tables leave out who was held up. Results go to benchmarks/results,
one file a set of rows; `python -m benchmarks.tables` makes the README's tables of them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.checks import disagreements, failures, hold_ups
from benchmarks.harness import (
    Contender,
    command_line,
    describe_machine,
    end,
    in_short,
    matmul_rates,
    real_task,
    run,
    write_result,
)
from benchmarks.rows import SETS, tokens_of_updates

PRECOMPUTED = {"precompute_ref_log_probs": True}
CONTENDERS = (
    Contender("ours", "ours"),
    Contender("TRL", "trl"),
    Contender("ours, reference precomputed", "ours", PRECOMPUTED, cache="precomputed"),
    Contender("TRL, reference precomputed", "trl", PRECOMPUTED),
    Contender("ours, products kept", "ours", {"gradient_checkpointing": False}),
    Contender("ours, second run", "ours", PRECOMPUTED, cache="precomputed"),
    Contender("TRL, 4 pairs at a time", "trl", {"per_device_train_batch_size": 4}),
    Contender("ours, 2 pairs an update", "ours", pairs=2),
    Contender("EasyDeL 0.3.0, 2 pairs an update", "easydel", pairs=2),
)


def measure(
    name: str, contenders: Sequence[Contender], interpreters: dict[str, str], arguments: argparse.Namespace
) -> dict[str, Any]:
    """All rounds on one set of rows; what is known so far is written after every run."""
    with tempfile.TemporaryDirectory(prefix="easydel-headline-") as folder:
        task, rows, left_out = real_task(Path(folder), name, arguments)
        result: dict[str, Any] = {
            "set": name,
            "files": list(SETS[name]),
            "rows": len(rows),
            "left_out": left_out,
            "pairs": arguments.pairs,
            "updates": arguments.updates,
            "max_length": arguments.max_length,
            "tokens": tokens_of_updates(rows, arguments.pairs),
            "machine": describe_machine(),
            "matmul": [matmul_rates()],
            "runs": [],
        }
        for number in range(arguments.rounds):
            caches: dict[str, Path] = {}
            for contender in contenders:
                cache = None
                if contender.cache is not None:
                    cache = caches.setdefault(contender.cache, Path(tempfile.mkdtemp(dir=folder)))
                measured = run(contender, task, interpreters, cache)
                result["runs"].append({"round": number} | measured)
                write_result(result, arguments.output, f"headline_{name}")
                print(f"{name}, round {number + 1}, {contender.name}: {in_short(measured)}", flush=True)
            result["matmul"].append(matmul_rates())
        result["disagreements"] = failures(result) + disagreements(result)
        write_result(result, arguments.output, f"headline_{name}")
    return result


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--trl-python", help="interpreter with TRL; without it, TRL is left out")
    parser.add_argument("--easydel-python", help="interpreter with EasyDeL 0.3.0; without it, EasyDeL is left out")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=["mixed"])
    parser.add_argument("--contenders", nargs="+", choices=[contender.name for contender in CONTENDERS])
    parser.add_argument("--rounds", type=int, default=1)
    parser.set_defaults(updates=8)
    arguments = parser.parse_args()
    interpreters = {"ours": sys.executable, "trl": arguments.trl_python, "easydel": arguments.easydel_python}
    interpreters = {trainer: python for trainer, python in interpreters.items() if python is not None}
    names = arguments.contenders or [contender.name for contender in CONTENDERS]
    contenders = [one for one in CONTENDERS if one.name in names and one.trainer in interpreters]
    wrong: list[str] = []
    for name in arguments.sets:
        result = measure(name, contenders, interpreters, arguments)
        wrong += result["disagreements"] + hold_ups(result)
    end(wrong)


if __name__ == "__main__":
    main()

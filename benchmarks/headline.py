"""SmolLM2-135M-Instruct trained on the same real rows by us and by peers: time, memory, first update.

    python -m benchmarks.headline --trl-python <interpreter with golden/requirements.txt>

Every contender is a process of its own in an environment of its own, started with empty caches; rounds go through all
contenders before the next one begins. Losses must agree and nothing may be held up, or the command fails; tables leave
out who was held up. Results go to benchmarks/results, one file a set of rows; `python -m benchmarks.write_tables` makes
the README's tables of them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.suite import machine
from benchmarks.suite.agreement import disagreements, failures, hold_ups
from benchmarks.suite.contenders import Contender, Task, run
from benchmarks.suite.matmul import matmul_rates
from benchmarks.suite.model_folder import write_model_folder
from benchmarks.suite.rows import DATA, SETS, choose, tokens_of_updates, write_rows

RESULTS = Path(__file__).parent / "results"
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
    name: str,
    files: Sequence[Path],
    contenders: Sequence[Contender],
    interpreters: dict[str, str],
    arguments: argparse.Namespace,
    output: Path,
) -> dict[str, Any]:
    """All rounds on one set of rows; what is known so far is written after every run."""
    with tempfile.TemporaryDirectory(prefix="easydel-headline-") as folder:
        tokenizer = write_model_folder(Path(folder) / "model")
        rows, left_out = choose(files, arguments.pairs * arguments.updates, tokenizer, arguments.max_length)
        rows_file = Path(folder) / "rows.jsonl"
        write_rows(rows, rows_file)
        result: dict[str, Any] = {
            "set": name,
            "files": [file.name for file in files],
            "rows": len(rows),
            "left_out": left_out,
            "pairs": arguments.pairs,
            "updates": arguments.updates,
            "max_length": arguments.max_length,
            "tokens": tokens_of_updates(rows, arguments.pairs),
            "machine": machine.describe(),
            "matmul": [matmul_rates()],
            "runs": [],
        }
        for number in range(arguments.rounds):
            caches: dict[str, Path] = {}
            for contender in contenders:
                task = Task(
                    rows_file,
                    Path(folder) / "model",
                    arguments.max_length,
                    contender.pairs or arguments.pairs,
                    arguments.updates,
                    learning_rate=1e-5,
                )
                cache = None
                if contender.cache is not None:
                    cache = caches.setdefault(contender.cache, Path(tempfile.mkdtemp(dir=folder)))
                measured = run(contender, task, interpreters, cache)
                result["runs"].append({"round": number} | measured)
                output.write_text(json.dumps(result, indent=1) + "\n")
                print(f"{name}, round {number + 1}, {contender.name}: {in_short(measured)}", flush=True)
            result["matmul"].append(matmul_rates())
        result["disagreements"] = failures(result) + disagreements(result)
        output.write_text(json.dumps(result, indent=1) + "\n")
    return result


def in_short(measured: dict[str, Any]) -> str:
    if "failure" in measured:
        return f"failed: {measured['failure']}"
    seconds = ", ".join(f"{update['seconds']:.1f}" for update in measured["updates"])
    return f"updates of {seconds} s, {measured['peak_memory'] / 1e9:.2f} GB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", help="interpreter with TRL; without it, TRL is left out")
    parser.add_argument("--easydel-python", help="interpreter with EasyDeL 0.3.0; without it, EasyDeL is left out")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=["mixed"])
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the sets' files")
    parser.add_argument("--contenders", nargs="+", choices=[contender.name for contender in CONTENDERS])
    parser.add_argument("--pairs", type=int, default=16, help="of one update")
    parser.add_argument("--updates", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder")
    arguments = parser.parse_args()
    interpreters = {"ours": sys.executable, "trl": arguments.trl_python, "easydel": arguments.easydel_python}
    interpreters = {trainer: python for trainer, python in interpreters.items() if python is not None}
    names = arguments.contenders or [contender.name for contender in CONTENDERS]
    contenders = [one for one in CONTENDERS if one.name in names and one.trainer in interpreters]
    arguments.output.mkdir(parents=True, exist_ok=True)
    wrong: list[str] = []
    for name in arguments.sets:
        files = [arguments.data / file for file in SETS[name]]
        if missing := [file for file in files if not file.is_file()]:
            parser.error(f"there is no {missing[0]}; give the folder of the data with --data.")
        output = arguments.output / f"headline_{name}.json"
        result = measure(name, files, contenders, interpreters, arguments, output)
        wrong += result["disagreements"] + hold_ups(result)
    if wrong:
        raise SystemExit("these results are not to be used:\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()

"""What every command shares: who is compared, how one is run, on which rows, and what its verdict is.

A contender is a process of its own, in an environment of its own. `python -m benchmarks.harness` prints the rate of
large float32 matrix products.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.rows import DATA, SETS, TextRow, choose, write_rows

ROOT = Path(__file__).parents[1]
HERE = Path(__file__).parent
RESULTS = HERE / "results"


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to train.

    Attributes:
      name: what the tables call it.
      trainer: "ours", "trl" or "easydel", the script that runs it.
      options: what differs from the trainer's defaults.
      cache: contenders of one round that name the same cache find what the earlier one has kept; each other one starts
        with nothing.
      environment: variables for its process alone.
      pairs: of one update, where it cannot do what the others do.
    """

    name: str
    trainer: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    cache: str | None = None
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    pairs: int | None = None

    @property
    def scores_reference(self) -> bool:
        """Whether the reference is part of its updates."""
        return not self.options.get("precompute_ref_log_probs", False)


@dataclasses.dataclass(frozen=True)
class Task:
    """What all of them are to do; the names are those of `measurement.arguments_of_a_contender`."""

    rows: Path
    model: Path
    max_length: int
    pairs: int
    updates: int
    learning_rate: float = 1e-5
    platform: str = "cpu"


def command(contender: Contender, task: Task, interpreters: Mapping[str, str], output: Path) -> list[str]:
    """The command line of a contender."""
    script = {
        "ours": ["-m", "benchmarks.run_ours"],
        # By path: a peer that is called easydel as well must not find our package beside it.
        "trl": [str(HERE / "run_trl.py")],
        "easydel": [str(HERE / "run_easydel.py")],
    }[contender.trainer]
    words = [interpreters[contender.trainer], *script, "--output", str(output)]
    for field in dataclasses.fields(task):
        words += [f"--{field.name.replace('_', '-')}", str(getattr(task, field.name))]
    return [*words, "--options", json.dumps(dict(contender.options))]


def run(contender: Contender, task: Task, interpreters: Mapping[str, str], cache: Path | None = None) -> dict[str, Any]:
    """Train, and give who did what and what was measured, or ``failure``: why there is nothing."""
    about = {"contender": contender.name, "trainer": contender.trainer, "pairs": task.pairs}
    about["scores_reference"] = contender.scores_reference
    with tempfile.TemporaryDirectory(prefix="easydel-benchmark-") as name:
        scratch = Path(name)
        # Nothing that an earlier run has kept is found, unless a cache is given; no peer asks the network.
        environment = os.environ | {
            "PYTHONPATH": str(ROOT) if contender.trainer == "ours" else "",
            "XDG_CACHE_HOME": str(cache or scratch),
            "HF_HOME": str(scratch),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "JAX_PLATFORMS": task.platform,
        }
        if task.platform == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        output = scratch / "measured.json"
        words = command(contender, task, interpreters, output)
        # Training scripts may write to where they stand.
        process = subprocess.run(
            words, env=environment | contender.environment, cwd=scratch, capture_output=True, text=True, check=False
        )
        if process.returncode:
            last_lines = "\n".join(process.stderr.strip().splitlines()[-15:])
            print(f"{contender.name} failed with status {process.returncode}:\n{last_lines}", file=sys.stderr)
            if process.returncode == -signal.SIGKILL:
                return about | {"failure": "ran out of memory or was killed"}
            return about | {"failure": last_lines.rpartition("\n")[2] or f"status {process.returncode}"}
        return about | json.loads(output.read_text())


def in_short(measured: Mapping[str, Any]) -> str:
    """A run in one line, for those who wait."""
    if "failure" in measured:
        return f"failed: {measured['failure']}"
    seconds = ", ".join(f"{update['seconds']:.1f}" for update in measured["updates"])
    return f"updates of {seconds} s, {measured['peak_memory'] / 1e9:.2f} GB"


def real_task(folder: Path, name: str, arguments: argparse.Namespace) -> tuple[Task, list[TextRow], dict[str, int]]:
    """SmolLM2-135M-Instruct and one of the `SETS` of rows, written below `folder`; and why rows were left out."""
    from easydel import AutoEasyDeLModelForCausalLM, load_tokenizer
    from easydel.infra.download import smollm2_135m_instruct

    files = [arguments.data / file for file in SETS[name]]
    if missing := [file for file in files if not file.is_file()]:
        raise SystemExit(f"there is no {missing[0]}; give the folder of the data with --data.")
    source, model = smollm2_135m_instruct(), folder / "model"
    tokenizer = load_tokenizer(source)
    if not model.exists():
        AutoEasyDeLModelForCausalLM.from_pretrained(source).save_pretrained(model)
        tokenizer.save_pretrained(model)
    rows, left_out = choose(files, arguments.pairs * arguments.updates, tokenizer, arguments.max_length)
    rows_file = folder / f"{name}.jsonl"
    write_rows(rows, rows_file)
    return Task(rows_file, model, arguments.max_length, arguments.pairs, arguments.updates), rows, left_out


def command_line(description: str | None) -> argparse.ArgumentParser:
    """The options that every command on real rows has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the sets' files")
    parser.add_argument("--pairs", type=int, default=16, help="of one update")
    parser.add_argument("--updates", type=int, default=6)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder")
    return parser


def write_result(result: Mapping[str, Any], folder: Path, name: str) -> None:
    """Write what is known so far, for `benchmarks.tables`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


def end(wrong: Sequence[str]) -> None:
    """Fail where results are not to be used."""
    if wrong:
        raise SystemExit("these results are not to be used:\n" + "\n".join(wrong))


# What a user may have set that changes speed or memory.
VARIABLES = ("GLIBC_TUNABLES", "LD_PRELOAD", "MALLOC_ARENA_MAX", "OMP_NUM_THREADS", "XLA_FLAGS")


def describe_machine() -> dict[str, Any]:
    """Processor, memory and settings of this machine."""
    models = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    total = next(line for line in _lines("/proc/meminfo") if line.startswith("MemTotal"))
    return {
        "processor": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": int(total.split()[1]) * 1024,
        "python": platform.python_version(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


# A layer's largest product in SmolLM2-135M over 4096 tokens, and a square one. [rows, inner, columns]
SHAPES = {"4096 x 576 x 1536": (4096, 576, 1536), "2048 x 2048 x 2048": (2048, 2048, 2048)}
REPEATS = 15


def rate(rows: int, inner: int, columns: int) -> float:
    """FLOP/s of one product, the median of some."""
    import jax
    import jax.numpy as jnp

    keys = jax.random.split(jax.random.key(0))
    x, y = jax.random.normal(keys[0], (rows, inner)), jax.random.normal(keys[1], (inner, columns))
    multiply = jax.jit(jnp.matmul)
    multiply(x, y).block_until_ready()
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        multiply(x, y).block_until_ready()
        seconds.append(time.perf_counter() - started)
    return 2 * rows * inner * columns / median(seconds)


def matmul_rates() -> dict[str, float]:
    """FLOP/s of each shape, in a process of its own."""
    words = [sys.executable, "-m", "benchmarks.harness"]
    return json.loads(subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout)


def matmul_rate(measured: Sequence[Mapping[str, float]]) -> float:
    """FLOP/s of the quickest shape, the median over what was measured before, between and after."""
    return max(median(rates[shape] for rates in measured) for shape in SHAPES)


if __name__ == "__main__":
    print(json.dumps({name: rate(*shape) for name, shape in SHAPES.items()}))

"""Check attention on a CUDA machine, then measure updates of a 0.5 B and a 1.5 B model with each switch turned.

    python -m benchmarks.gpu                                   # on a machine with an NVIDIA GPU
    python -m benchmarks.gpu --trl-python path/to/bin/python   # beside TRL, from an environment that has it
    JAX_PLATFORMS=cpu python -m benchmarks.gpu --tiny          # tries the command itself, anywhere

Prints pairs a second, useful-token MFU, peak memory and kernel shares, and writes them with the device's name to
results/gpu-<device>.json. Ends with code 1 where numbers disagree. Every variant is a process of its own; one that does
not fit the device's memory says so. Models have random weights, pairs are made token ids, weights are float32 and
computed with in bfloat16; an update scores the reference, makes the step and is timed on one batch again and again.

Useful-token MFU counts each prompt once and no padding, recomputation or attention scores, whatever the variant does,
so it orders variants as pairs a second do. It needs the device's bfloat16 peak (`easydel.infra.device`).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.accelerator.shapes import LEARNING_RATE, SHAPES, made_pairs
from benchmarks.accelerator.variants import VARIANTS
from easydel.infra.device import data_sheet_flops

ROOT = Path(__file__).parents[1]
# The device's attention may be this much further from float32 than XLA's in the same dtype: a flash kernel rounds
# weights before they are normalised.
LARGEST_RATIO = 2.5
# Policy and reference are two compiled programs, and bfloat16 rounds in other places in each.
FIRST_LOSS_TOLERANCE = 0.01
LOSS_TOLERANCE = 0.05


class OutOfMemory(Exception):
    """A process asked for more than the device has."""


def run(module: str, *words: str) -> Any:
    """What a process of its own prints as its last line; this one leaves the device alone, and so its memory."""
    process = subprocess.run(
        [sys.executable, "-m", f"benchmarks.accelerator.{module}", *words],
        cwd=ROOT,
        # JAX would leave a quarter of a GPU's memory unused.
        env={"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"} | os.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode == 0:
        return json.loads(process.stdout.splitlines()[-1])
    if "RESOURCE_EXHAUSTED" in process.stderr:
        raise OutOfMemory(next(line for line in process.stderr.splitlines() if "RESOURCE_EXHAUSTED" in line)[:200])
    raise SystemExit(f"{module} {' '.join(words)} failed:\n{process.stderr}")


def measure(shape: str, variant: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One variant's numbers, or ``{"error": why there are none}``."""
    words = ["--shape", shape, "--variant", variant, "--pairs", str(arguments.pairs)]
    words += ["--updates", str(arguments.updates), *(["--trace"] if variant == "as compared" else [])]
    try:
        return run("measure_update", *words)
    except OutOfMemory as error:
        return {"error": f"out of memory: {error}"}


def measure_trl(shape: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """TRL on the same pairs, in the largest micro-batch that fits."""
    pairs = [
        {"prompt_ids": pair.prompt_ids.tolist(), "chosen_ids": pair.chosen_ids.tolist()}
        | {"rejected_ids": pair.rejected_ids.tolist()}
        for pair in made_pairs(SHAPES[shape], arguments.pairs)
    ]
    micro_batch = arguments.pairs
    while True:
        request = {"config": SHAPES[shape].config, "pairs": pairs, "updates": arguments.updates}
        request |= {"micro_batch": micro_batch, "learning_rate": LEARNING_RATE}
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            file.write(json.dumps(request))
            file.flush()
            script = ROOT / "benchmarks/accelerator/run_trl.py"
            process = subprocess.run(
                [arguments.trl_python, script, file.name], capture_output=True, text=True, check=False
            )
        if process.returncode == 0:
            return json.loads(process.stdout.splitlines()[-1])
        if "OutOfMemoryError" not in process.stderr or micro_batch % 2:
            return {"error": process.stderr.strip().splitlines()[-1]}
        micro_batch //= 2


def check_attention(shape: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Errors of both forms, and what is wrong with them."""
    rows, problems = run("attention_check", "--shape", shape), []
    print(f"\nattention, {shape}: relative error against float32\n\n| window | form | out | dq | dk | dv |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        errors = " | ".join(f"{row[name]:.1e}" for name in ("out", "dq", "dk", "dv"))
        print(f"| {row['window']} | {row['form']} | {errors} |")
    for own, xla in zip(rows[::2], rows[1::2]):
        for name in ("out", "dq", "dk", "dv"):
            # Written so that NaN is a problem.
            if not own[name] <= LARGEST_RATIO * xla[name]:
                problems.append(f"attention, {shape}, window {own['window']}: {name} is off by {own[name]:.1e}")
    return rows, problems


def check_losses(shape: str, results: dict[str, dict[str, Any]], trl: dict[str, Any] | None) -> list[str]:
    """The first loss is ln 2, and every variant goes down the same way; TRL starts from other random weights."""
    expected = results["as compared"].get("losses")
    problems = [
        f"{shape}, {name}: the first loss is {result['losses'][0]:.4f} and not ln 2"
        for name, result in {**results, "TRL": trl or {}}.items()
        if "losses" in result and not abs(result["losses"][0] - math.log(2)) <= FIRST_LOSS_TOLERANCE
    ]
    for name, result in results.items():
        if "losses" not in result:
            continue
        if expected and not all(abs(x - y) <= LOSS_TOLERANCE for x, y in zip(result["losses"], expected)):
            problems.append(f"{shape}, {name}: losses {result['losses']} differ from {expected}")
    return problems


def print_table(shape: str, results: dict[str, dict[str, Any]], trl: dict[str, Any] | None, peak: float) -> None:
    print(
        f"\n{shape}\n\n| variant | rows | pairs/s | times the first | useful-token MFU | peak memory, GB | first loss |"
    )
    print("|---|---|---|---|---|---|---|")
    first = results["as compared"]
    for name, result in results.items():
        if "error" in result:
            print(f"| {name} | {result['error']} | | | | | |")
            continue
        speed, rows = result["pairs"] / result["seconds"], "x".join(map(str, result["rows"]))
        relative = first["seconds"] / result["seconds"] if "seconds" in first else math.nan
        memory = result["peak_bytes"] or result["planned_bytes"]
        note = "" if result["peak_bytes"] else " (as compiled)"
        mfu = result["useful_flops"] / result["seconds"] / peak
        print(
            f"| {name} | {rows} | {speed:.2f} | {relative:.2f} | {mfu:.1%} | {memory / 1e9:.2f}{note} "
            f"| {result['losses'][0]:.4f} |"
        )
    if trl is not None and "error" in trl:
        print(f"| TRL | {trl['error']} | | | | | |")
    elif trl is not None:
        versions = ", ".join(f"{name} {version}" for name, version in trl["versions"].items())
        seconds, memory = trl["seconds"], trl["peak_bytes"]
        pairs, flops = (first.get(name, math.nan) for name in ("pairs", "useful_flops"))
        print(
            f"| {versions}, micro-batch {trl['micro_batch']} | | {pairs / seconds:.2f} "
            f"| {first.get('seconds', math.nan) / seconds:.2f} | {flops / seconds / peak:.1%} "
            f"| {'' if memory is None else f'{memory / 1e9:.2f}'} | {trl['losses'][0]:.4f} |"
        )
    shares = first.get("kernel_shares")
    if shares:
        print(f"\nthe device's busy time of {shares['busy_seconds']:.2f} s went into:\n")
        for kind, share in shares["kinds"].items():
            print(f"- {kind}: {share:.1%}")
        print("\nlargest kernels:\n")
        for kernel in shares["kernels"]:
            print(f"- {kernel['share']:.1%} {kernel['kernel'][:90]} ({kernel['operation'][:40]})")


def peak_flops(arguments: argparse.Namespace, kind: str) -> float:
    """FLOP/s that MFU is a share of."""
    if arguments.peak_tflops is not None:
        return arguments.peak_tflops * 1e12
    known = data_sheet_flops(kind)
    if known is None:
        raise SystemExit(
            f'the bfloat16 peak of "{kind}" is not in the table of easydel/infra/device.py; '
            "give the data sheet's dense figure as --peak-tflops."
        )
    return known


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["0.5b", "1.5b"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--pairs", type=int, default=32, help="of one update")
    parser.add_argument("--updates", type=int, default=10, help="timed, after one that warms up")
    parser.add_argument("--peak-tflops", type=float, help="the device's dense bfloat16 peak, where it is not known")
    parser.add_argument("--trl-python", help="an interpreter that has torch and TRL; without it TRL is left out")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on any device, to try the command itself")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results", help="folder")
    arguments = parser.parse_args()
    device = run("describe_device")
    kind = device["device"]
    if arguments.tiny:
        arguments.shapes, arguments.pairs, arguments.updates = ["tiny"], 4, 2
        arguments.peak_tflops = arguments.peak_tflops or 1.0
    elif device["platform"] != "gpu":
        raise SystemExit(
            f'JAX sees no GPU here but "{kind}". Install its CUDA version (pip install -U "jax[cuda13]") '
            "on a machine with an NVIDIA GPU, or try the command itself with --tiny."
        )
    if arguments.variants[0] != "as compared":
        arguments.variants.insert(0, "as compared")
    peak = peak_flops(arguments, kind)
    print(f"{kind}, jax {device['jax']}, {peak / 1e12:.0f} TFLOP/s, {arguments.pairs} pairs an update")
    report: dict[str, Any] = device | {"peak_flops": peak, "shapes": {}}
    problems = []
    for shape in arguments.shapes:
        attention, wrong = check_attention(shape)
        results = {variant: measure(shape, variant, arguments) for variant in arguments.variants}
        trl = measure_trl(shape, arguments) if arguments.trl_python else None
        problems += wrong + check_losses(shape, results, trl)
        print_table(shape, results, trl, peak)
        report["shapes"][shape] = {"attention": attention, "variants": results, "trl": trl}
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / f"gpu-{re.sub('[^a-z0-9]+', '-', kind.lower())}.json"
    path.write_text(json.dumps(report | {"problems": problems}, indent=1) + "\n")
    print(f"\nwritten to {path}")
    if problems:
        raise SystemExit("numbers disagree:\n" + "\n".join(problems))


if __name__ == "__main__":
    main()

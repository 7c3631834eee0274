"""Where the time of an update goes, forward and backward, beside the floors: SmolLM2-135M-Instruct on real rows.

    python -m benchmarks.profile_update --name after
    python -m benchmarks.profile_update --name before --checkout ../an-older-checkout

Writes results/profile_<name>.json. The reference's pass is timed by itself; its parts are those of the forward pass.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.suite import machine
from benchmarks.suite.matmul import matmul_rates
from benchmarks.suite.measurement import Stopwatch, was_held_up
from benchmarks.suite.operation_times import events, origins, seconds_by_operation

RESULTS = Path(__file__).parent / "results"


def memory_rate(numbers: int = 2**28, repeats: int = 5) -> float:
    """Bytes a second that an addition to a large array reads and writes, the median of some."""
    import jax
    import jax.numpy as jnp

    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = add(jnp.zeros(numbers))
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        x = jax.block_until_ready(add(x))
        seconds.append(time.perf_counter() - started)
    return 2 * 4 * numbers / sorted(seconds)[repeats // 2]


def profile(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds by part of one update of a warm program, and what it had to do."""
    import jax
    from datasets import Dataset

    from benchmarks.suite.arithmetic import flops_by_part
    from benchmarks.suite.rows import SETS, choose, write_rows
    from easydel import AutoEasyDeLModelForCausalLM, DPOConfig, DPOTrainer, load_tokenizer
    from easydel.infra.mesh import put_batch
    from easydel.weights.download import smollm2_135m_instruct

    cache = tempfile.TemporaryDirectory(prefix="easydel-profile-")
    folder = smollm2_135m_instruct()
    # Programs and log-probs that an earlier run has kept would be found in one profile and not in another.
    os.environ["XDG_CACHE_HOME"] = cache.name
    tokenizer, model = load_tokenizer(folder), AutoEasyDeLModelForCausalLM.from_pretrained(folder)
    rows, _ = choose(
        [arguments.data / file for file in SETS[arguments.set]], arguments.pairs, tokenizer, arguments.max_length
    )
    with tempfile.TemporaryDirectory() as name:
        rows_file, trace = Path(name) / "rows.jsonl", Path(name) / "trace"
        write_rows(rows, rows_file)
        config = DPOConfig(
            total_batch_size=arguments.pairs,
            max_length=arguments.max_length,
            max_prompt_length=None,
            shuffle_train_dataset=False,
            save_directory=None,
            progress_bar=False,
        )
        trainer = DPOTrainer(
            config, model, None, tokenizer, Dataset.from_list([json.loads(row) for row in rows_file.open()])
        )
        model_config = model.config
        del model
        laps, reference = [], []
        with contextlib.closing(trainer.dataloaders.train.iterate()) as batches, jax.set_mesh(trainer.mesh):
            on_host = next(batches)
            # The second time its program is compiled, and nothing is cached for other keys.
            for number in range(2):
                keyed = on_host | {"pair_keys": on_host["pair_keys"] ^ number}
                started = time.perf_counter()
                batch = trainer.prepare_batch(trainer.state, keyed, put_batch(on_host, trainer.mesh))
                jax.block_until_ready(batch)
                reference.append(time.perf_counter() - started)
            step = jax.jit(trainer.make_steps()[0], donate_argnums=0).lower(trainer.state, batch).compile()
            state, trainer.state = trainer.state, None
            for _ in range(arguments.updates + 1):
                stopwatch = Stopwatch()
                state, _ = jax.block_until_ready(step(state, batch))
                laps.append(stopwatch.lap())
            with jax.profiler.trace(trace):
                started = time.perf_counter()
                jax.block_until_ready(step(state, batch))
                traced = time.perf_counter() - started
        if any(map(was_held_up, laps[1:])):
            raise SystemExit("held up by other work; measure again on a machine that does nothing else.")
        known = origins(step.as_text())
        seconds = seconds_by_operation(events(trace, known))
    parts: Counter[tuple[str, bool]] = Counter()
    for operation, time_of_it in seconds.items():
        parts[known[operation]] += time_of_it
    return {
        "machine": machine.describe(),
        "set": arguments.set,
        "pairs": arguments.pairs,
        "max_length": arguments.max_length,
        "tokens": int((on_host["segment_ids"] > 0).sum()),
        "reference_seconds": reference[-1],
        "update_seconds": [lap["seconds"] for lap in laps[1:]],
        "traced_seconds": traced,
        "parts": [
            {"part": part, "is_backward": is_backward, "seconds": total}
            for (part, is_backward), total in parts.most_common()
        ],
        "forward_flops": flops_by_part(model_config, on_host),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.model)),
        "memory_rate": memory_rate(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="after", help="of the result")
    parser.add_argument("--checkout", type=Path, help="folder of the easydel to profile, if not this one")
    parser.add_argument("--set", default="mixed", help="of rows: mixed, short or long")
    parser.add_argument("--data", type=Path, help="folder of the sets' files")
    parser.add_argument("--pairs", type=int, default=16, help="of one update")
    parser.add_argument(
        "--updates", type=int, default=3, help="timed, between one that warms up and one that is traced"
    )
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder")
    arguments = parser.parse_args()
    if arguments.checkout is not None:
        # Before anything imports the package.
        sys.path.insert(0, str(arguments.checkout.resolve()))
    from benchmarks.suite.rows import DATA

    arguments.data = arguments.data or DATA
    result = profile(arguments)
    result["matmul"] = [matmul_rates()]
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / f"profile_{arguments.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"updates of {', '.join(f'{seconds:.1f}' for seconds in result['update_seconds'])} s")
    for part in result["parts"]:
        print(f"{part['seconds']:7.2f} s {'backward' if part['is_backward'] else 'forward '} {part['part']}")


if __name__ == "__main__":
    main()

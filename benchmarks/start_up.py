"""Seconds from the command to the first updates of SmolLM2-135M-Instruct, by what they are spent on.

Every start is a fresh process with the same private cache folder: the first finds it empty, the second finds the
compiled programs and the reference's log-probs of the first.

    python benchmarks/start_up.py
"""

import argparse
import collections
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

DATA = Path(__file__).parents[1] / "examples/data/train.jsonl"
ROWS = "rows.jsonl"
UPDATES, PAIRS = 2, 4
EVENTS = {
    "/jax/core/compile/jaxpr_trace_duration": "trace",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower",
    "/jax/core/compile/backend_compile_duration": "compile",
}
COUNTS = {"/jax/compilation_cache/cache_misses": "compiled", "/jax/compilation_cache/cache_hits": "from cache"}
COLUMNS = ("seconds", "trace", "lower", "compile", "compiled", "from cache")


class Stages:
    """Wall-clock seconds, and JAX's own count of compilation, of one part of a run after the other."""

    def __init__(self) -> None:
        self.rows: dict[str, collections.Counter] = {}
        self._jax: collections.Counter = collections.Counter()

    def listen(self) -> None:
        import jax

        def count(name: str, amount: float) -> None:
            self._jax[name] += amount

        jax.monitoring.register_event_duration_secs_listener(
            lambda event, seconds, **_: count(EVENTS[event], seconds) if event in EVENTS else None
        )
        jax.monitoring.register_event_listener(lambda event, **_: count(COUNTS[event], 1) if event in COUNTS else None)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started, before = time.perf_counter(), self._jax.copy()
        yield
        self.add(name, time.perf_counter() - started, before)

    def add(self, name: str, seconds: float, before: collections.Counter) -> None:
        self.rows[name] = collections.Counter(self._jax) - before
        self.rows[name]["seconds"] = seconds


def one_start(model: str, interpreter_seconds: float) -> None:
    """What a user's program does, stage by stage; prints the stages as JSON."""
    stages = Stages()
    stages.rows["interpreter"] = collections.Counter(seconds=interpreter_seconds)
    with stages.stage("imports"):
        from easydel import (
            AutoEasyDeLModelForCausalLM,
            DPOConfig,
            DPOTrainer,
            TrainerCallback,
            load_tokenizer,
            open_source,
        )

        stages.listen()

    class Marks(TrainerCallback):
        def __init__(self):
            self.mark()

        def mark(self):
            self.time, self.before = time.perf_counter(), stages._jax.copy()

        def done(self, name):
            stages.add(name, time.perf_counter() - self.time, self.before)
            self.mark()

        def on_train_begin(self, trainer):
            self.done("identity of the run")

        def on_step_end(self, trainer, step):
            trainer.state.step.block_until_ready()
            self.done(f"update {step}")

    with stages.stage("tokenizer"):
        tokenizer = load_tokenizer(model)
    with stages.stage("weights"):
        policy = AutoEasyDeLModelForCausalLM.from_pretrained(model)
    with stages.stage("trainer"):
        folder = Path(model).parent
        config = DPOConfig(
            total_batch_size=PAIRS,
            max_training_steps=UPDATES,
            max_length=256,
            max_prompt_length=128,
            save_directory=str(folder / "runs"),
            progress_bar=False,
        )
        marks = Marks()
        trainer = DPOTrainer(config, policy, None, tokenizer, open_source(folder / ROWS), callbacks=[marks])
    marks.mark()
    trainer.train()
    marks.done("end of the run")
    print(json.dumps(stages.rows))


def start(model: str, cache: str) -> dict[str, dict[str, float]]:
    """One start in a process of its own."""
    command = [sys.executable, __file__, "--model", model, "--spawned", str(time.time())]
    environment = os.environ | {"XDG_CACHE_HOME": cache}
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])


def show(name: str, rows: dict[str, dict[str, float]]) -> None:
    print(f"\n{name:22}" + "".join(f"{column:>12}" for column in COLUMNS))
    total = collections.Counter()
    for row in rows.values():
        total.update(row)
    for label, row in {**rows, "sum": total}.items():
        numbers = "".join(f"{row.get(column, 0):12.2f}" for column in COLUMNS[:4])
        print(f"{label:22}{numbers}" + "".join(f"{round(row.get(column, 0)):12d}" for column in COLUMNS[4:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=2)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--spawned", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.model is not None:
        one_start(arguments.model, time.time() - arguments.spawned)
        return

    from easydel import AutoEasyDeLModelForCausalLM, load_tokenizer
    from easydel.weights.download import smollm2_135m_instruct

    name = str(smollm2_135m_instruct())
    with tempfile.TemporaryDirectory() as folder:
        model = str(Path(folder) / "model")
        AutoEasyDeLModelForCausalLM.from_pretrained(name).save_pretrained(model, dtype="bfloat16")
        load_tokenizer(name).save_pretrained(model)
        (Path(folder) / ROWS).write_text("".join(DATA.read_text().splitlines(keepends=True)[: UPDATES * PAIRS]))
        for number in range(1, arguments.starts + 1):
            show(f"start {number}", start(model, str(Path(folder) / "cache")))


if __name__ == "__main__":
    main()

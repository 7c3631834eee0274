"""Run files, values on the command line, and `easydel show`, through the command itself."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import random
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from easydel import DPOConfig
from easydel.cli import main
from tests.fuzz.inputs import HOSTILE_TEXTS, SEEDS, bent, damaged, json_text
from tests.fuzz.judge import judge_message
from tests.fuzz.made import ROWS, model_folder, write_rows

FIELDS = [field.name for field in dataclasses.fields(DPOConfig)]
FIELDS += ["model", "train_dataset", "eval_dataset", "dtype", "output"]
# fmt: off
SCALARS = [
    "1", "-1", "0", "1e400", "nan", "0x10", "0o7", "1_000", "2024-01-01", "12:30:45", "2024-13-45", "true",
    "yes", "~", "null", ".inf", "1.5e", "*a", "<<", "'", "=", "@", "%", "`",
]
SCALARS += [
    "9" * 400, "9" * 5000, "!!python/object:os.system x", "!!binary aGk=", "&a 1", "[1, 2", "{a: 1", "? x",
    "- 1",
]
# fmt: on
SCALARS += ["\\x1b", "\t", "[" * 900, "{a: " * 900, "!!timestamp 1", "!!int x", "!!set {a}"]
SCALARS += [repr(text) for text in HOSTILE_TEXTS if text.isprintable()]


def _command(arguments: list[str]) -> None:
    """Run a command; what it says and its exit code must be fit for a user."""
    printed, said = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(printed):
        code = main(arguments)
    assert code in (0, 2), f"exit code {code}"
    wrong = judge_message(said.getvalue(), "of the command") or judge_message(
        printed.getvalue()[:1500], "of the command"
    )
    assert wrong is None, wrong.kind


def run_files(work: Path) -> Any:
    """YAML files for --config; the model they train does not exist, so that none of them starts a run."""
    path = work / "run.yaml"
    good = "model: /nothing\ntrain_dataset: [a.jsonl, b.jsonl]\nlearning_rate: 1e-6\nloss_type: sigmoid\n"
    good += "lora_rank: 8\nextra_optimizer_kwargs: {b1: 0.9}\nreport_to: []\n"
    aliases = "a: &a [x]\n" + "".join(
        f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 9)}]\n" for n in range(9)
    )

    def lines(seed: int) -> bytes:
        rng = random.Random(seed)
        return "".join(
            f"{rng.choice(FIELDS)}: {rng.choice(SCALARS)}\n" for _ in range(rng.choice((1, 1, 2, 4)))
        ).encode()

    def run(content: bytes) -> Any:
        path.write_bytes(content)
        _command(["dpo", "--config", str(path), "--model", "/nothing", "--train-dataset", "/nothing.jsonl"])

    structured = bent(yaml.safe_load(good)).map(lambda value: json_text(value).encode())
    contents = st.builds(lines, SEEDS) | damaged(good.encode()) | structured | st.sampled_from([aliases.encode()])
    return contents | st.binary(max_size=30), run, True


def arguments(work: Path) -> Any:
    """One to three options with values of every kind."""
    flags = [f"--{name.replace('_', '-')}" for name in FIELDS]
    flags += [f"--no-{name}" for name in ("progress-bar", "do-eval")] + ["--help", "--versio", "-x", "--", ""]
    values = [
        *SCALARS,
        *(text for text in HOSTILE_TEXTS if "\0" not in text),
        "a=1",
        "a=b",
        "=",
        "a=",
        "1e-3",
        "sigmoid",
        "float16",
    ]
    pair = st.tuples(st.sampled_from(flags), st.lists(st.sampled_from(values), max_size=3)).map(
        lambda two: [two[0], *two[1]]
    )

    def run(words: list[str]) -> Any:
        _command(["dpo", "--model", "/nothing", "--train-dataset", "/nothing.jsonl", *words])

    return st.lists(pair, min_size=1, max_size=3).map(lambda words: [word for option in words for word in option]), run


def shown(work: Path) -> Any:
    """`easydel show` of files of rows; what it prints must not steer a terminal."""
    folder, path = model_folder(work / "model"), work / "rows.jsonl"
    write_rows(path)
    rows = st.lists(bent(*ROWS), min_size=1, max_size=2)

    def run(given: dict[str, Any]) -> Any:
        path.write_text("".join(json_text(row) + "\n" for row in given["rows"]))
        _command(["show", str(path), "--model", str(folder), "--row", str(given["row"])])

    return st.fixed_dictionaries({"rows": rows, "row": st.sampled_from([0, 0, 0, 1, -1, 10**30])}), run

"""Other people's troubles, kept beside the repository: every script exits 0, every damaged file is refused shortly."""

from __future__ import annotations

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from filelock import FileLock
from safetensors.numpy import save_file

from easydel.modules.llama import LlamaForCausalLM
from tests.conftest import USERS_CACHE
from tests.fuzz.judge import judge_message
from tests.tiny import make_rows, make_tokenizer, tiny_config

ROOT = Path(__file__).parents[1]
CASES = ROOT / "../shared/cases"
SCRIPTS = sorted(CASES.glob("[0-9]*.py"))
FILES = sorted((CASES / "files").glob("*"))
SECONDS, MEGABYTES = 30, 2048  # of processor time, and of memory beside what a run needs anyway
HANGS = 240
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SCRIPTS, reason="there is no ../shared/cases beside the repository"),
]


@pytest.fixture(scope="session")
def environment(tmp_path_factory) -> dict[str, str]:
    """What a case's process sees; the model of the scripts is made once, from a download that is kept."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "COLUMNS": "200"}
    if USERS_CACHE is None:
        environment.pop("XDG_CACHE_HOME", None)
    else:
        environment["XDG_CACHE_HOME"] = USERS_CACHE
    with FileLock(tmp_path_factory.getbasetemp().parent / "model-of-the-cases.lock"):
        command = [sys.executable, "-c", "import common"]
        made = subprocess.run(
            command, cwd=CASES, env=environment | {"PYTHONPATH": f"{ROOT}:."}, capture_output=True, text=True
        )
    if made.returncode:
        pytest.skip(f"the model of the cases cannot be made here: {made.stderr.strip().splitlines()[-1]}")
    return environment


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_trouble_of_others_is_right_or_refused(script, environment):
    done = subprocess.run(
        [sys.executable, str(script)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=HANGS
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


@pytest.fixture
def place(tmp_path) -> Path:
    """A working folder with a model named base and rows."""
    model = LlamaForCausalLM.init(tiny_config(), jax.random.key(0))
    model.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows()))
    return tmp_path


def command_of(file: Path, place: Path) -> list[list[str]]:
    """The commands that read a case's file, by what its name says it is."""
    base, rows = place / "base", "t.jsonl"
    dpo = ["dpo", "--train-dataset", rows, "--max-training-steps", "1", "--total-batch-size", "2", "--no-progress-bar"]
    kind = file.name.split("-")[0]
    if kind == "config":
        shutil.copy(file, base / "config.json")
    elif kind == "index":
        shutil.copy(file, base / "model.safetensors.index.json")
    elif kind == "tok":
        shutil.copy(file, base / "tokenizer_config.json")
    elif kind == "gguf":
        shutil.copy(file, place / "model.gguf")
        return [[*dpo, "--model", "model.gguf"], ["show", rows, "--model", "model.gguf"]]
    elif kind == "adapter":
        write_adapter(place, file)
        return [[*dpo, "--model", "adapter"]]
    elif kind == "yaml":
        shutil.copy(file, place / "run.yaml")
        return [["dpo", "--config", "run.yaml", "--model", "base", "--no-progress-bar"]]
    else:
        if kind == "rows":
            row = ast.literal_eval(file.read_text())  # as Python writes it
            data = place / "rows.jsonl"
            data.write_text(json.dumps(row) + "\n")
        else:
            data = place / file.name
            shutil.copy(file, data)
        train = [data.name if word == rows else word for word in dpo]
        return [["show", data.name, "--model", "base"], [*train, "--model", "base"]]
    return [[*dpo, "--model", "base"], ["show", rows, "--model", "base"]]


def write_adapter(place: Path, config: Path) -> None:
    """An adapter of rank 2 for every layer of the model, with this config."""
    folder = place / "adapter"
    folder.mkdir()
    shutil.copy(config, folder / "adapter_config.json")
    for file in (place / "base").glob("*token*"):
        shutil.copy(file, folder)
    sizes = {"q_proj": (32, 32), "k_proj": (32, 16), "v_proj": (32, 16), "o_proj": (32, 32)}
    sizes |= {"gate_proj": (32, 64), "up_proj": (32, 64), "down_proj": (64, 32)}
    tensors = {}
    for layer in range(2):
        for name, (size_in, size_out) in sizes.items():
            part = "mlp" if name in ADAPTED[4:] else "self_attn"
            module = f"base_model.model.model.layers.{layer}.{part}.{name}"
            tensors[f"{module}.lora_A.weight"] = np.ones((2, size_in), np.float32)
            tensors[f"{module}.lora_B.weight"] = np.zeros((size_out, 2), np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_damaged_or_hostile_file_is_read_or_refused_in_a_few_words(file, place, environment):
    for command in command_of(file, place):
        code, printed, said, seconds, megabytes = run(command, place, environment)
        assert code in (0, 2), f"{command}: exit code {code}\n{said[-3000:]}"
        assert "Traceback" not in said
        if code == 2:
            assert said.count("easydel: error:") == 1 or "row" in printed, said or printed
            assert judge_message(said, "") is None, said
        assert judge_message(printed[:1500], "") is None, printed
        assert seconds < SECONDS and megabytes < MEGABYTES, f"{command}: {seconds:.0f} s, {megabytes} MB"


def run(command: list[str], place: Path, environment: dict[str, str]) -> tuple[int, str, str, float, int]:
    """Exit code, output, errors, processor seconds and largest memory in megabytes of `easydel` with these words."""
    out, errors = place / "out.txt", place / "errors.txt"
    with out.open("wb") as printed, errors.open("wb") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "easydel", *command], cwd=place, env=environment, stdout=printed, stderr=said
        )
        started, pid = time.monotonic(), 0
        while not pid:
            pid, status, used = os.wait4(process.pid, os.WNOHANG)
            if not pid and time.monotonic() - started > HANGS:
                process.send_signal(signal.SIGKILL)
            time.sleep(0.02)
    process.returncode = os.waitstatus_to_exitcode(status)
    texts = (path.read_text("utf-8", "replace") for path in (out, errors))
    return process.returncode, *texts, used.ru_utime + used.ru_stime, used.ru_maxrss // 1024

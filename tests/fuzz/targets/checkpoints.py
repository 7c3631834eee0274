"""A run folder with one of its files damaged, bent, cut or gone; then the run goes on from its latest checkpoint."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from easydel import DPOConfig, DPOTrainer, LlamaForCausalLM
from tests.fuzz.inputs import SEEDS, json_text, mutate_bytes, mutate_json
from tests.tiny import make_rows, make_tokenizer, tiny_config

RUN = "run"


def damaged_notes(work: Path) -> Any:
    """Any file of a finished run; what goes on must end where the run ended, or be refused."""
    folder, kept = work / "runs", work / "kept"
    # In a process of its own: a supervisor that started JAX could not fork.
    subprocess.run([sys.executable, "-m", __name__, str(folder)], check=True, capture_output=True)
    shutil.copytree(folder, kept)
    expected = dict(np.load(folder / "expected.npz"))
    files = sorted(
        str(path.relative_to(kept)) for path in (kept / RUN).rglob("*") if path.is_file() and path.stat().st_size
    )

    def run(given: dict[str, Any]) -> Any:
        shutil.rmtree(folder)
        shutil.copytree(kept, folder)
        path = folder / given["file"]
        match given["how"]:
            case "gone":
                path.unlink()
            case "empty":
                path.write_bytes(b"")
            case "bent" if (value := _as_json(path)) is not None:
                path.write_text(json_text(mutate_json(value, given["seed"])))
            case "bent" if path.suffix == ".jsonl":
                lines = path.read_text().splitlines()
                lines[0] = json_text(mutate_json(json.loads(lines[0]), given["seed"]))
                path.write_text("\n".join(lines))
            case _:
                path.write_bytes(mutate_bytes(path.read_bytes(), given["seed"]))
        trainer = _trainer(str(folder), resume_from_checkpoint="latest")
        trainer.train()
        for name, array in _arrays(trainer).items():
            assert np.array_equal(array, expected[name]), f"the run went on from damaged arrays ({path.name[:8]})"

    hows = st.sampled_from(["gone", "empty", "bent", "bent", "damaged", "damaged"])
    return st.fixed_dictionaries({"file": st.sampled_from(files), "how": hows, "seed": SEEDS}), run


def _as_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        return None


@functools.cache
def _parts() -> tuple[Any, Any, Any]:
    import jax
    from datasets import Dataset

    model = LlamaForCausalLM.init(tiny_config(), jax.random.key(0))
    return model, make_tokenizer(), Dataset.from_list(make_rows()[:8])


def _trainer(folder: str, **options: Any) -> DPOTrainer:
    model, tokenizer, rows = _parts()
    config = DPOConfig(
        save_directory=folder,
        model_name=RUN,
        total_batch_size=4,
        learning_rate=1e-2,
        max_training_steps=2,
        save_steps=1,
        progress_bar=False,
        **options,
    )
    return DPOTrainer(config, model, None, tokenizer, rows)


def _arrays(trainer: DPOTrainer) -> dict[str, np.ndarray]:
    import jax

    return {str(number): np.asarray(leaf) for number, leaf in enumerate(jax.tree.leaves(trainer.state.model))}


if __name__ == "__main__":
    trainer = _trainer(sys.argv[1])
    trainer.train()
    np.savez(Path(sys.argv[1]) / "expected.npz", **_arrays(trainer))

"""Seconds of an update of SmolLM2-135M-Instruct with the reference's log-probs scored and with them looked up.

python benchmarks/reference_cache.py
"""

import argparse
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

from easydel import AutoEasyDeLModelForCausalLM, DPOConfig, DPOTrainer, load_tokenizer, open_source
from easydel.infra.download import smollm2_135m_instruct

DATA = Path(__file__).parents[1] / "examples/data/train.jsonl"
WARM_UP = 3


def seconds_of_an_update(name: str, updates: int, pairs: int) -> float:
    config = DPOConfig(
        total_batch_size=pairs,
        max_training_steps=updates,
        max_length=256,
        max_prompt_length=128,
        learning_rate=1e-5,
        save_directory=None,
        progress_bar=False,
    )
    model = AutoEasyDeLModelForCausalLM.from_pretrained(name)
    log = DPOTrainer(config, model, None, load_tokenizer(name), open_source(DATA)).train().log_history
    return float(np.median([pairs / line["train/pairs_per_second"] for line in log[WARM_UP:]]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=4, help="of one update")
    arguments = parser.parse_args()
    name = str(smollm2_135m_instruct())
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        # Compiles for every shape of a batch, and fills the cache.
        seconds_of_an_update(name, arguments.updates, arguments.pairs)
        looked_up = seconds_of_an_update(name, arguments.updates, arguments.pairs)
        shutil.rmtree(Path(folder) / "easydel/reference-log-probs")
        scored = seconds_of_an_update(name, arguments.updates, arguments.pairs)
    print(f"{arguments.pairs} pairs an update, median of {arguments.updates - WARM_UP} updates")
    print(f"reference scored     {scored:.2f} s")
    print(f"reference looked up  {looked_up:.2f} s")
    print(f"ratio                {scored / looked_up:.2f}")


if __name__ == "__main__":
    main()

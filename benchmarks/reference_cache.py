"""Seconds of an update of SmolLM2-135M-Instruct with the reference's log-probs scored and with them looked up.

Every update is on the same pairs, so that nothing is compiled after the first one.

    python benchmarks/reference_cache.py
"""

import argparse
import itertools
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from datasets import Dataset

from easydel import AutoEasyDeLModelForCausalLM, DPOConfig, DPOTrainer, load_tokenizer, open_source
from easydel.data.batching.packing import Batch, PackingLayout, pack
from easydel.data.tree import PreferencePair
from easydel.weights.download import smollm2_135m_instruct

DATA = Path(__file__).parents[1] / "examples/data/train.jsonl"
WARM_UP = 2  # the first compiles, and scores what the others look up


def without_order(pairs: Sequence[PreferencePair]) -> Batch:
    """A batch that does not say which pair is where, so that nothing can be looked up."""
    batch = pack(pairs, PackingLayout(padding_value=0))
    del batch["pair_order"]
    return batch


def seconds_of_an_update(name: str, rows: Dataset, updates: int, is_looked_up: bool) -> float:
    config = DPOConfig(
        total_batch_size=len(rows),
        num_train_epochs=updates + WARM_UP,
        shuffle_train_dataset=False,
        max_length=256,
        max_prompt_length=128,
        learning_rate=1e-5,
        save_directory=None,
        progress_bar=False,
    )
    model = AutoEasyDeLModelForCausalLM.from_pretrained(name)
    collator = None if is_looked_up else without_order
    log = DPOTrainer(config, model, None, load_tokenizer(name), rows, data_collator=collator).train().log_history
    return float(np.median([len(rows) / line["train/pairs_per_second"] for line in log[WARM_UP:]]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=4, help="of one update")
    arguments = parser.parse_args()
    name = str(smollm2_135m_instruct())
    rows = Dataset.from_list(list(itertools.islice(open_source(DATA), arguments.pairs)))
    with tempfile.TemporaryDirectory() as folder:
        # Nothing an earlier run has kept is found.
        os.environ["XDG_CACHE_HOME"] = folder
        looked_up, scored = (
            seconds_of_an_update(name, rows, arguments.updates, is_looked_up) for is_looked_up in (True, False)
        )
    print(f"{arguments.pairs} pairs an update, median of {arguments.updates} updates")
    print(f"reference scored     {scored:.2f} s")
    print(f"reference looked up  {looked_up:.2f} s")
    print(f"ratio                {scored / looked_up:.2f}")


if __name__ == "__main__":
    main()

"""Float64 logits of SmolLM2-135M-Instruct from `transformers`: the whole last place, some entries at every place."""

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXT = "The quick brown fox jumps over the lazy dog. 1 + 2 = 3, und süß wie Äpfel; def f(x):\n    return x ** 2"
VOCABULARY_STEP = 499


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of SmolLM2-135M-Instruct in bfloat16")
    parser.add_argument("--output", default=Path(__file__).parents[2] / "tests/golden/smollm2_logits.npz")
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32, attn_implementation="eager")
    input_ids = AutoTokenizer.from_pretrained(arguments.model)(TEXT)["input_ids"]
    with torch.no_grad():
        rounded = model(torch.tensor([input_ids])).logits[0].numpy()
        # In float64: transformers' own float32 logits are off by 9e-5 themselves.
        logits = model.double()(torch.tensor([input_ids])).logits[0].numpy()
    np.savez_compressed(
        arguments.output,
        input_ids=np.array(input_ids, np.int32),
        last_logits=logits[-1].astype(np.float32),
        vocabulary_step=np.array(VOCABULARY_STEP),
        some_logits=logits[:, ::VOCABULARY_STEP].astype(np.float32),
    )
    print(f"{len(input_ids)} tokens, logits from {logits.min():.2f} to {logits.max():.2f} -> {arguments.output}")
    print(f"largest error of transformers' float32 logits: {np.abs(rounded - logits).max():.1e}")


if __name__ == "__main__":
    main()

"""Save an adapter made by PEFT with the logits it gives, or check one that `easydel` saved.

Without arguments, writes tests/golden/peft_adapter: a PEFT folder of random weights (the second factors too) on the
golden llama beside `golden.npz`: input_ids [2, 24], logits [2, 24, vocab] float32 with the adapter on. With
``--check FOLDER``, opens that adapter on the golden llama and compares with the logits in FOLDER/logits.npz.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden"
OUTPUT = GOLDEN / "peft_adapter"
# An adapter counts only if it moves some logit by far more than any float32 disagreement between implementations.
VISIBLE = 0.5
CLOSE = 1e-4


def base_model() -> PreTrainedModel:
    """The golden llama, float32, plain attention, evaluation mode."""
    folder = str(GOLDEN / "families" / "llama")
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()


@torch.no_grad()
def make() -> None:
    """Write the golden adapter; rank and alpha are such that plain and rank-stabilised scales differ."""
    with np.load(GOLDEN / "families" / "llama" / "golden.npz", allow_pickle=False) as file:
        input_ids = file["input_ids"]
    torch.manual_seed(0)
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        lora_dropout=0.1,
        use_rslora=True,
        target_modules=["q_proj", "o_proj", "down_proj"],
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base_model(), config).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_(0.0, 0.3)
    logits = model(torch.from_numpy(input_ids).long()).logits.numpy()
    with model.disable_adapter():
        moved = np.abs(model(torch.from_numpy(input_ids).long()).logits.numpy() - logits).max()
    assert moved > VISIBLE, f"the adapter moves the logits by {moved} only"
    model.peft_config["default"].base_model_name_or_path = "tests/golden/families/llama"  # from the repository's root
    model.save_pretrained(OUTPUT)
    (OUTPUT / "README.md").unlink()
    np.savez_compressed(OUTPUT / "golden.npz", input_ids=input_ids, logits=logits)
    print(f"{OUTPUT}: the adapter moves the logits by up to {moved:.3f}")


@torch.no_grad()
def check(folder: Path) -> None:
    """Compare an adapter's logits with those that its maker computed."""
    model = PeftModel.from_pretrained(base_model(), str(folder)).eval()
    with np.load(folder / "logits.npz", allow_pickle=False) as file:
        input_ids, expected = torch.from_numpy(file["input_ids"]).long(), file["logits"]
    difference = np.abs(model(input_ids).logits.numpy() - expected).max()
    merged = np.abs(model.merge_and_unload()(input_ids).logits.numpy() - expected).max()
    moved = np.abs(base_model()(input_ids).logits.numpy() - expected).max()
    print(f"largest difference from peft {difference:.1e}, merged by peft {merged:.1e}; from the base {moved:.3f}")
    assert difference < CLOSE and merged < CLOSE and moved > VISIBLE


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", type=Path, metavar="FOLDER", help="adapter folder with a logits.npz")
    arguments = parser.parse_args()
    if arguments.check is None:
        make()
    else:
        check(arguments.check)

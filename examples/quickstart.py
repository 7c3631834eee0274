"""Teach a 135M chat model to answer briefly and to end with a "Next step: …?" question, on two CPU cores.

Fetches SmolLM2-135M-Instruct (about 90 MB, once), trains it by DPO on the pairs in ``examples/data`` and shows what
changed: numbers on held-out pairs, two answers before and after, and curves.

    python examples/quickstart.py
    python examples/quickstart.py --model path/to/model --output my-run
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from datasets import Dataset
from plot import METRICS, print_curves, save_curves
from rich.console import Console
from rich.table import Table

from easydel import AutoEasyDeLModelForCausalLM, DPOConfig, DPOTrainer, EasyDeLBaseModule, load_tokenizer, open_source
from easydel.data import PreferenceTransform, RowFault
from easydel.infra.download import smollm2_135m_instruct

DATA = Path(__file__).parent / "data"
HELD_OUT_PAIRS = 16  # enough to see the change, few enough for two cores
ANSWER_TOKENS = 80  # longer answers are cut and marked […]

console = Console()


@dataclass(frozen=True)
class Quickstart:
    """Train a small chat model by DPO and show what changed."""

    model: str | None = None
    """Model folder, hub id or .gguf file; by default SmolLM2-135M-Instruct, fetched on the first run."""
    output: Path = Path("quickstart-output")
    """Folder for the trained model, the log and the curves."""


def main(options: Quickstart) -> None:
    started = time.perf_counter()
    console.print("Loading the model (the first run fetches about 90 MB) …")
    name = options.model or smollm2_135m_instruct()
    model = AutoEasyDeLModelForCausalLM.from_pretrained(name)
    tokenizer = load_tokenizer(name)

    train_dataset = open_source(DATA / "train.jsonl")
    held_out = Dataset.from_list(list(open_source(DATA / "heldout.jsonl"))).select(range(HELD_OUT_PAIRS))
    questions = list(held_out.select(range(2)))
    answers_before = answer(model, tokenizer, questions)

    config = DPOConfig(
        beta=0.1,
        rpo_alpha=1.0,  # also learn to say the chosen answers, not only to prefer them
        learning_rate=1e-4,
        warmup_steps=2,
        total_batch_size=4,
        max_training_steps=16,
        evaluation_steps=8,
        eval_batch_size=16,
        max_length=256,
        max_prompt_length=128,
        save_directory=str(options.output),
        model_name="log",
    )
    # The reference is None: the policy is held near the model as it is now.
    trainer = DPOTrainer(config, model, None, tokenizer, train_dataset, held_out)
    training_started = time.perf_counter()
    output = trainer.train()
    training_seconds = time.perf_counter() - training_started

    trainer.save_pretrained(options.output / "model")
    answers_after = answer(trainer.model, tokenizer, questions)
    show_answers(questions, answers_before, answers_after)
    print_curves(output.log_history, color=console.is_terminal)
    save_curves(output.log_history, options.output / "curves.png")
    show_numbers(output.log_history)

    rest = time.perf_counter() - started - training_seconds
    console.print(f"Trained model  {options.output / 'model'}", highlight=False)
    console.print(f"Curves         {options.output / 'curves.png'}", highlight=False)
    console.print(
        f"Training took {training_seconds:.0f} s with compilation and evaluation, everything else {rest:.0f} s."
    )


def answer(model: EasyDeLBaseModule, tokenizer: Any, rows: list[dict[str, Any]]) -> list[str]:
    """The model's greedy answers to the prompts of rows."""
    pairs = [PreferenceTransform(tokenizer, max_length=None, max_prompt_length=None)(row) for row in rows]
    if faults := [pair.message for pair in pairs if isinstance(pair, RowFault)]:
        raise SystemExit("\n".join(faults))
    prompts = [pair.prompt_ids.tolist() for pair in pairs]
    answers = model.generate(prompts, max_new_tokens=ANSWER_TOKENS, stop_token_ids=[tokenizer.eos_token_id])
    return [tokenizer.decode(tokens) + (" […]" if len(tokens) == ANSWER_TOKENS else "") for tokens in answers]


def show_answers(rows: list[dict[str, Any]], before: list[str], after: list[str]) -> None:
    for row, old, new in zip(rows, before, after):
        table = Table(title=row["prompt"][-1]["content"], show_header=False, show_lines=True)
        table.add_row("before", old)
        table.add_row("after", new)
        console.print(table)


def show_numbers(log: list[dict[str, Any]]) -> None:
    evaluations = [line for line in log if "eval/loss" in line]
    table = Table(title=f"{HELD_OUT_PAIRS} held-out pairs")
    for column in ("", "before", "after"):
        table.add_column(column, justify="right")
    for metric, label in METRICS.items():
        table.add_row(label, *(f"{line[f'eval/{metric}']:.3f}" for line in (evaluations[0], evaluations[-1])))
    console.print(table)
    console.print("Accuracy before is 0.5 by definition: policy = reference, so every pair ties.")


if __name__ == "__main__":
    main(tyro.cli(Quickstart))

"""Record three optimiser steps of TRL's own DPOTrainer, value by value, as a golden trace for our trainer.

The rows reach TRL as plain text in which the chat template is already rendered, so both trainers see the same token
ids: prompt = template with generation prompt, completion = content followed by one stop token and nothing else.
Every value is the one TRL computed *before* the step's update, read at full precision instead of from its rounded log.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden"
STEPS = 3
MAX_LENGTH = 512

# Elsewhere TRL 1.16 accepts label_smoothing and silently ignores it, so such a trace would be mislabelled.
HONOUR_LABEL_SMOOTHING = {"robust", "exo_pair", "aot", "aot_unpaired"}

# Short rows with different prompts. Chosen longer: 78, 118, 151; rejected longer: 281.
DEFAULT_ROWS = [78, 118, 151, 281]


@dataclass
class MicroBatch:
    """Values of one forward pass; tensors have one entry a pair."""

    loss: torch.Tensor
    rewards_chosen: torch.Tensor
    rewards_rejected: torch.Tensor
    logps_chosen: torch.Tensor
    logps_rejected: torch.Tensor
    ref_logps_chosen: torch.Tensor
    ref_logps_rejected: torch.Tensor


@dataclass
class Recording:
    """Everything the trainer saw, in the order it happened."""

    micro_batches: list[MicroBatch] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    decayed: list[str] = field(default_factory=list)
    undecayed: list[str] = field(default_factory=list)


class RecordingTrainer(DPOTrainer):
    """DPOTrainer that listens to its own intermediate values and changes none of them."""

    recording: Recording

    def __init__(self, **kwargs: Any) -> None:
        self.recording = Recording()
        super().__init__(**kwargs)

    def _compute_loss(self, model: PreTrainedModel, inputs: dict[str, torch.Tensor], return_outputs: bool) -> Any:
        # The per-pair tensors are locals of the method; on their way to the metrics they all pass through `gather`.
        gathered: list[torch.Tensor] = []
        gather = self.accelerator.gather

        def listen(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.ndim == 1:
                gathered.append(tensor.detach().clone())
            return gather(tensor)

        self.accelerator.gather = listen
        try:
            loss = super()._compute_loss(model, inputs, return_outputs)
        finally:
            self.accelerator.gather = gather

        if len(gathered) != 6:
            raise RuntimeError(f"expected six per-pair metrics from TRL {trl.__version__}, found {len(gathered)}")
        rewards_chosen, rewards_rejected, _accuracies, margins, logps_chosen, logps_rejected = gathered
        ref_chosen, ref_rejected = self.compute_ref_log_probs(self.ref_model, inputs)
        torch.testing.assert_close(rewards_chosen, self.beta * (logps_chosen - ref_chosen), rtol=0, atol=1e-6)
        torch.testing.assert_close(rewards_rejected, self.beta * (logps_rejected - ref_rejected), rtol=0, atol=1e-6)
        torch.testing.assert_close(margins, rewards_chosen - rewards_rejected, rtol=0, atol=0)
        self.recording.micro_batches.append(
            MicroBatch(
                loss=loss.detach().clone(),
                rewards_chosen=rewards_chosen,
                rewards_rejected=rewards_rejected,
                logps_chosen=logps_chosen,
                logps_rejected=logps_rejected,
                ref_logps_chosen=ref_chosen,
                ref_logps_rejected=ref_rejected,
            )
        )
        return loss

    def _clip_grad_norm(self, model: PreTrainedModel) -> torch.Tensor:
        norm = super()._clip_grad_norm(model)
        self.recording.grad_norms.append(float(norm))
        self.recording.learning_rates.append(float(self.optimizer.param_groups[0]["lr"]))
        return norm

    def create_optimizer(self, model: PreTrainedModel | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for group in optimizer.param_groups:
            side = self.recording.decayed if group["weight_decay"] > 0 else self.recording.undecayed
            side.extend(names[id(parameter)] for parameter in group["params"])
        return optimizer


def render(tokenizer: PreTrainedTokenizerBase, data: Path, row_numbers: list[int]) -> list[dict[str, str]]:
    """Return plain-text rows with the chat template applied by us; rows must hold one assistant turn a side."""
    lines = data.read_text(encoding="utf-8").splitlines()
    rendered = []
    for number in row_numbers:
        row = json.loads(lines[number])
        prompt = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        completions = {}
        for side in ("chosen", "rejected"):
            (message,) = row[side]
            completions[side] = message["content"] + tokenizer.eos_token
        rendered.append({"prompt": prompt, **completions})
    if len({row["prompt"] for row in rendered}) != len(rendered):
        raise ValueError(f"rows {row_numbers} repeat a prompt; choose rows with different prompts")
    return rendered


def check_ids(tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, str]], prepared: Dataset) -> None:
    """Raise unless TRL's ids are exactly ours: whole prompt, one stop token at the end, nothing cut or appended."""
    if len(prepared) != len(rows):
        raise ValueError(f"TRL kept {len(prepared)} of {len(rows)} rows")
    for row, ids in zip(rows, prepared, strict=True):
        prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        if ids["prompt_ids"] != prompt:
            raise ValueError(f"TRL cut or changed the prompt {row['prompt']!r}")
        for side in ("chosen", "rejected"):
            completion = ids[f"{side}_ids"]
            if tokenizer.decode(prompt + completion) != row["prompt"] + row[side]:
                raise ValueError(f"TRL's {side} ids do not spell {row[side]!r}")
            if completion.count(tokenizer.eos_token_id) != 1 or completion[-1] != tokenizer.eos_token_id:
                raise ValueError(f"{side} must end in its only stop token, got {completion}")
            if len(prompt) + len(completion) > MAX_LENGTH:
                raise ValueError(f"row of {len(prompt) + len(completion)} tokens would be truncated to {MAX_LENGTH}")


def padded(sequences: list[list[int]], padding: int) -> tuple[np.ndarray, np.ndarray]:
    """Return right-padded ids [rows, longest] and lengths [rows], int32."""
    lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int32)
    ids = np.full((len(sequences), int(lengths.max())), padding, dtype=np.int32)
    for target, sequence in zip(ids, sequences, strict=True):
        target[: len(sequence)] = sequence
    return ids, lengths


def step_arrays(recording: Recording, micro_batches_per_step: int) -> dict[str, np.ndarray]:
    """Return per-step arrays: [steps] for loss, gradient norm and learning rate, [steps, pairs] for the rest."""
    grouped = [
        recording.micro_batches[start : start + micro_batches_per_step]
        for start in range(0, len(recording.micro_batches), micro_batches_per_step)
    ]
    # The Trainer back-propagates the mean of the micro-batch losses.
    losses = [float(np.mean([float(micro.loss) for micro in step], dtype=np.float64)) for step in grouped]
    arrays = {
        "loss": np.array(losses),
        "grad_norm": np.array(recording.grad_norms),
        "learning_rate": np.array(recording.learning_rates),
    }
    for name in (
        "logps_chosen",
        "logps_rejected",
        "ref_logps_chosen",
        "ref_logps_rejected",
        "rewards_chosen",
        "rewards_rejected",
    ):
        arrays[name] = np.stack(
            [torch.cat([vars(micro)[name] for micro in step]).numpy().astype(np.float32) for step in grouped]
        )
    return arrays


def check_sorting_matters(arrays: dict[str, np.ndarray]) -> None:
    """Raise if policy and reference log-ratios rank alike at every step: the sorting of aot then changes nothing."""
    policy = arrays["logps_chosen"] - arrays["logps_rejected"]
    reference = arrays["ref_logps_chosen"] - arrays["ref_logps_rejected"]
    if np.array_equal(policy.argsort(axis=1), reference.argsort(axis=1)):
        raise ValueError("aot gives the sigmoid loss on these rows; choose --rows with closer log-ratios")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder of the policy and reference")
    parser.add_argument("--data", type=Path, required=True, help="JSON lines with prompt/chosen/rejected messages")
    parser.add_argument("--rows", type=int, nargs="+", default=DEFAULT_ROWS, help="row numbers, from 0")
    parser.add_argument("--output", type=Path, default=GOLDEN / "trl_sigmoid_trace.npz")
    parser.add_argument("--loss-type", nargs="+", default=["sigmoid"])
    parser.add_argument("--loss-weights", type=float, nargs="+", default=None)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--label-smoothing", type=float, default=0.0)
    parser.add_argument("--f-divergence-type", default="reverse_kl")
    parser.add_argument("--f-alpha-divergence-coef", type=float, default=0.5)
    parser.add_argument("--ld-alpha", type=float, default=None)
    parser.add_argument("--use-weighting", action="store_true")
    parser.add_argument("--discopop-tau", type=float, default=0.05)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--micro-batch-size", type=int, default=None, help="pairs a forward pass; default: all")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.label_smoothing and not set(arguments.loss_type) <= HONOUR_LABEL_SMOOTHING:
        parser.error(
            f"TRL ignores --label-smoothing for {arguments.loss_type}; it is honoured by "
            f"{sorted(HONOUR_LABEL_SMOOTHING)}. For a smoothed sigmoid use --loss-type aot --micro-batch-size 1."
        )
    if arguments.micro_batch_size is None:
        arguments.micro_batch_size = len(arguments.rows)
    if len(arguments.rows) % arguments.micro_batch_size:
        parser.error(f"--micro-batch-size {arguments.micro_batch_size} does not divide {len(arguments.rows)} rows")
    return arguments


def main() -> None:
    """Run the trainer, save the trace and print it with elapsed time and peak memory."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    started = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    rows = render(tokenizer, arguments.data, arguments.rows)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    # SmolLM2's pad token is its stop token, and torch's Embedding gives the pad token's row no gradient from the input
    # side: a quirk of that class, not part of the objective. Without it every token's embedding is trained.
    model.get_input_embeddings().padding_idx = None
    micro_batches_per_step = len(rows) // arguments.micro_batch_size
    settings = {
        "loss_type": arguments.loss_type,
        "loss_weights": arguments.loss_weights,
        "beta": arguments.beta,
        "label_smoothing": arguments.label_smoothing,
        "f_divergence_type": arguments.f_divergence_type,
        "f_alpha_divergence_coef": arguments.f_alpha_divergence_coef,
        "ld_alpha": arguments.ld_alpha,
        "use_weighting": arguments.use_weighting,
        "discopop_tau": arguments.discopop_tau,
        "max_length": MAX_LENGTH,
        "learning_rate": arguments.learning_rate,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": arguments.weight_decay,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "max_grad_norm": 1.0,
        "max_steps": STEPS,
        "per_device_train_batch_size": arguments.micro_batch_size,
        "gradient_accumulation_steps": micro_batches_per_step,
        "seed": 0,
    }
    with tempfile.TemporaryDirectory() as scratch:
        trainer = RecordingTrainer(
            model=model,
            processing_class=tokenizer,
            train_dataset=Dataset.from_list(rows),
            args=DPOConfig(
                output_dir=scratch,
                optim="adamw_torch",
                train_sampling_strategy="sequential",
                disable_dropout=True,
                gradient_checkpointing=False,
                bf16=False,
                fp16=False,
                use_cpu=True,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                **settings,
            ),
        )
        prepared = trainer.train_dataset
        check_ids(tokenizer, rows, prepared)
        if trainer.model.dtype != torch.float32 or trainer.ref_model.dtype != torch.float32:
            raise ValueError(f"expected float32, got {trainer.model.dtype} and {trainer.ref_model.dtype}")
        train_started = time.perf_counter()
        trainer.train()
        train_seconds = time.perf_counter() - train_started

    recording = trainer.recording
    if any("norm" in name or "bias" in name for name in recording.decayed):
        raise ValueError("expected no norm or bias among the decayed parameters")
    arrays = step_arrays(recording, micro_batches_per_step)
    if len(arrays["loss"]) != STEPS or len(arrays["grad_norm"]) != STEPS:
        raise ValueError(f"expected {STEPS} steps, recorded {len(arrays['loss'])}")
    if "aot" in arguments.loss_type and arguments.micro_batch_size > 1:
        check_sorting_matters(arrays)
    for part in ("prompt", "chosen", "rejected"):
        ids, lengths = padded(prepared[f"{part}_ids"][:], tokenizer.pad_token_id)
        arrays |= {f"{part}_ids": ids, f"{part}_lengths": lengths}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        arguments.output,
        row_numbers=np.array(arguments.rows, dtype=np.int32),
        decayed_parameters=np.array(recording.decayed),
        undecayed_parameters=np.array(recording.undecayed),
        settings=np.array(json.dumps(settings)),
        versions=np.array(
            json.dumps({"torch": torch.__version__, "transformers": transformers.__version__, "trl": trl.__version__})
        ),
        **arrays,
    )

    with np.load(arguments.output, allow_pickle=False) as saved:
        for step in range(STEPS):
            print(
                f"step {step}  loss {saved['loss'][step]:.9f}  grad_norm {saved['grad_norm'][step]:.7f}  "
                f"lr {saved['learning_rate'][step]:.1e}  chosen {saved['logps_chosen'][step]}  "
                f"rejected {saved['logps_rejected'][step]}"
            )
    # ru_maxrss is in kB on Linux and in bytes on macOS.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(
        f"{arguments.output.name}: {len(recording.decayed)} tensors decayed, {len(recording.undecayed)} not; "
        f"train {train_seconds:.1f} s, total {time.perf_counter() - started:.1f} s, peak memory {peak / 2**30:.2f} GiB"
    )


if __name__ == "__main__":
    main()

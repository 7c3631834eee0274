"""What makes two runs the same run, and how to say that they are not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Options that change how a run is watched, kept or laid out, but not what it computes.
OPTIONS_OF_A_SESSION = frozenset(
    {
        "gradient_accumulation_steps",
        "gradient_checkpointing",
        "max_nonfinite_steps",
        "eval_batch_size",
        "do_eval",
        "evaluation_steps",
        "best_metric",
        "early_stopping_patience",
        "max_training_seconds",
        "log_steps",
        "report_to",
        "progress_bar",
        "save_directory",
        "model_name",
        "save_steps",
        "save_total_limit",
        "resume_from_checkpoint",
        "eval_samples",
        "eval_sample_tokens",
        "packing",
        "share_prompt",
        "precompute_ref_log_probs",
    }
)


def as_json(identity: Mapping[str, Any]) -> dict[str, Any]:
    """An identity as it comes back from a checkpoint's notes: tuples are lists there."""
    return json.loads(json.dumps(identity))


def refuse_other_run(checkpoint: Path, saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise `ValueError` that names every difference between a checkpoint's run and this one."""
    differences = [
        f"{name}: the checkpoint has {saved.get(name, 'nothing')!r}, this run {own.get(name, 'nothing')!r}"
        for name in sorted(saved.keys() | own.keys())
        if saved.get(name) != own.get(name)
    ]
    if differences:
        shown = "\n  ".join(differences)
        raise ValueError(
            f"{checkpoint} is of another run:\n  {shown}\nGive this run the checkpoint's settings to go on with it, or "
            "start anew without resume_from_checkpoint (load the trained weights as the model to build on them)."
        )

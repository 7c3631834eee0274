"""What makes two runs the same run, and how to say that they are not."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# Options that change how the arithmetic is laid out; without dropout, results do not depend on them.
OPTIONS_OF_LAYOUT = frozenset({"gradient_accumulation_steps", "micro_batch_tokens", "packing", "share_prompt"})
# Besides, those that change how a run is watched or kept, but not what it computes.
OPTIONS_OF_A_SESSION = OPTIONS_OF_LAYOUT | {
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
    "precompute_ref_log_probs",
}


def as_json(identity: Mapping[str, Any]) -> dict[str, Any]:
    """An identity as it comes back from a checkpoint's notes: tuples are lists there, objects text."""
    return json.loads(json.dumps(identity, default=str))


def refuse_other_run(checkpoint: Path, saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise `ValueError` that names every difference between a checkpoint's run and what is known of this one."""
    differences = list(_differences({name: value for name, value in saved.items() if name in own}, own))
    if differences:
        shown = "\n  ".join(differences)
        raise ValueError(
            f"{checkpoint} is of another run:\n  {shown}\nGive this run the checkpoint's settings to go on with it, or "
            "start anew without resume_from_checkpoint (load the trained weights as the model to build on them)."
        )


def _differences(saved: Mapping[str, Any], own: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name in sorted(saved.keys() | own.keys()):
        then, now = saved.get(name, "nothing"), own.get(name, "nothing")
        if isinstance(then, dict) and isinstance(now, dict):
            yield from _differences(then, now, f"{prefix}{name}.")
        elif then != now:
            yield f"{prefix}{name}: the checkpoint has {then!r}, this run {now!r}"

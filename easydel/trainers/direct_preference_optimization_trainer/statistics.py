"""Count a batch's pairs, tokens and useful arithmetic on the host, without asking the device."""

from __future__ import annotations

import numpy as np

from easydel.data.batching.packing import Batch, PackingLayout
from easydel.infra.base_module import EasyDeLBaseModule
from easydel.trainers.trainer_protocol import BatchStatistics


def describe_batch(batch: Batch, model: EasyDeLBaseModule, layout: PackingLayout) -> BatchStatistics:
    """Count the pairs, tokens, useful arithmetic, padding, completion lengths and cut pairs of a batch.

    Args:
      batch: as collated, with ``target_slots`` of two branches per slot.
      model: the policy, whose shape gives the floating-point operations.
      layout: says how many positions of the batch go through the model.
    """
    pairs = int(np.count_nonzero(batch["pair_mask"]))
    tokens = int(np.count_nonzero(batch["segment_ids"]))
    targets = batch["target_slots"]
    scored = int(np.count_nonzero(targets >= 0))
    chosen = int(np.count_nonzero((targets >= 0) & (targets % 2 == 0)))
    head = 2 * model.config.vocab_size * model.config.hidden_size
    means = {
        "padding_fraction": 1 - tokens / layout.positions_in_use(batch),
        "completion_length/chosen": chosen / pairs,
        "completion_length/rejected": (scored - chosen) / pairs,
    }
    if "pair_truncated" in batch:
        means["truncated_fraction"] = float(batch["pair_truncated"].sum()) / pairs
    rows = sorted(batch["pair_index"][batch["pair_mask"]].tolist())
    return BatchStatistics(
        examples=pairs,
        tokens=tokens,
        # The head's share: forward, gradient of the hidden state and, unless only adapters are trained, of its weight.
        flops=float(tokens * model.training_flops_per_token + scored * head * (2 if model.has_lora else 3)),
        means=means,
        names="rows " + ", ".join(map(str, rows[:32])) + (" …" if len(rows) > 32 else ""),
    )

"""All of a run's reference log-probs before its first update."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

from easydel.data.batching.packing import Batch
from easydel.infra.base_module import EasyDeLBaseModule
from easydel.trainers.callbacks.progress import track
from easydel.trainers.direct_preference_optimization_trainer.reference.scorer import ReferenceScorer
from easydel.trainers.trainer_protocol import DeviceBatch, TrainerConfigureDataloaderOutput

logger = logging.getLogger("easydel")


@dataclasses.dataclass(frozen=True)
class DataToScore:
    """A set to run through the reference.

    Attributes:
      name: what to call it.
      batches: as they will be trained or evaluated on.
      count: how many of them there are, or None.
      may_be_ready: whether it may bring its own log-probs; nothing is to be done then.
    """

    name: str
    batches: Iterable[Batch]
    count: int | None = None
    may_be_ready: bool = False


def data_of_run(loaders: TrainerConfigureDataloaderOutput, total_steps: int, *, do_eval: bool) -> list[DataToScore]:
    """One pass over what a run of `total_steps` updates trains on, in its order, and every evaluation set."""
    assert loaders.train is not None
    epoch = total_steps if loaders.steps_per_epoch is None else math.ceil(loaders.steps_per_epoch)
    steps = min(total_steps, epoch)
    sets = [DataToScore("train_dataset", itertools.islice(loaders.train.iterate(), steps), steps)]
    if do_eval:
        for name, loader in loaders.evaluation.items():
            sets.append(DataToScore(name or "eval_dataset", loader.iterate(), may_be_ready=True))
    return sets


def precompute(
    scorer: ReferenceScorer,
    policy: EasyDeLBaseModule,
    sets: Sequence[DataToScore],
    on_device: Callable[[Iterable[Batch]], Iterator[tuple[Batch, DeviceBatch]]],
    *,
    show_progress: bool,
) -> None:
    """Fill the cache with every pair of some sets, then put the reference's weights aside on disk.

    What is known already is not scored again: a fill that was interrupted goes on where it was.

    Raises:
      ValueError: the data brings log-probs of its own, or a collate function leaves open which pair is where.
    """
    with scorer.settled():
        for data in sets:
            label = f"reference log-probs of {data.name}"
            batches = track(data.batches, label, data.count) if show_progress else data.batches
            for batch, device_batch in on_device(batches):
                if "ref_chosen_logps" in batch and data.may_be_ready:
                    continue
                _check(batch)
                scorer(policy, batch, device_batch)
    logger.info(
        "%d pairs were scored by the reference, %d were known, in %s.",
        scorer.scored,
        scorer.found,
        scorer.cache(policy).path,
    )
    scorer.put_aside()


def _check(batch: Batch) -> None:
    if "ref_chosen_logps" in batch:
        raise ValueError(
            "precompute_ref_log_probs=True has no effect: the data brings ref_chosen_logps and ref_rejected_logps; "
            "drop the columns or set precompute_ref_log_probs=False."
        )
    if "pair_keys" not in batch:
        raise ValueError(
            'precompute_ref_log_probs=True needs to know which pair is where, but data_collator gives no "pair_keys"; '
            "add it (easydel.data.batching.packing.pack does) or set precompute_ref_log_probs=False."
        )

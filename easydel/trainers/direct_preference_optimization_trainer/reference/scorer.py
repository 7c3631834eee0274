"""Give a batch its reference log-probs: look up known pairs in the cache, score the others and cache them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from easydel.data.batching.packing import Batch
from easydel.infra.base_module import EasyDeLBaseModule
from easydel.infra.base_state import EasyDeLState
from easydel.infra.mesh import batch_sharding, put_batch
from easydel.trainers.callbacks.progress import track
from easydel.trainers.direct_preference_optimization_trainer.reference.cache import (
    ReferenceCache,
    SplitLogps,
    scorer_digest,
)
from easydel.trainers.direct_preference_optimization_trainer.reference.reference import Reference
from easydel.trainers.direct_preference_optimization_trainer.scoring import (
    ScoringOptions,
    score_in_micro_batches,
    whole_completions,
)
from easydel.trainers.trainer_protocol import CountMicroBatches, DeviceBatch, TrainerConfigureDataloaderOutput

logger = logging.getLogger("easydel")

LogProbs = tuple[Float[Array, "rows slots"], Float[Array, "rows slots"]]


@dataclasses.dataclass(frozen=True)
class ReferenceStatistics:
    """Counts of what a trainer has asked its reference for so far.

    Attributes:
      status: where the reference's weights are (`Reference`); ``none`` if the run keeps no reference.
      hits: pairs whose log-probs were in the cache.
      misses: pairs that were run through the reference.
      passes: batches that were run through the reference.
      stored: pairs in the cache's file now, of this run and of earlier ones; 0 if nothing has been looked up.
      cache_path: that file; None if nothing has been looked up.
    """

    status: Literal["live", "shared", "offloaded", "none"]
    hits: int
    misses: int
    passes: int
    stored: int
    cache_path: Path | None


class ReferenceScorer:
    """Scores batches under a reference, each pair once.

    A pair keeps the log-probs of the first time it was scored, in this run or an earlier one, so an interrupted run
    sees the same numbers as one that was not. They are stored one batch late: by then they have been computed, and the
    devices are busy with the update that needed them. `flush` stores the last ones.

    Args:
      reference: the model; None if there is none or it is uniform, which gives log-probs of 0.
      mesh: the devices of the batches.
      ld_alpha: weight of the tokens beyond the shorter completion's length.
      count_micro_batches: the number of micro-batches, from the shape ``(rows, length)`` of ``input_ids``.
      is_cached: whether log-probs are looked up and kept; the reference must not move then.
    """

    def __init__(
        self,
        reference: Reference | None,
        mesh: Mesh,
        *,
        ld_alpha: float | None,
        count_micro_batches: CountMicroBatches,
        is_cached: bool,
    ):
        self._reference = reference
        self._mesh = mesh
        self._is_cached = is_cached
        self._cache: ReferenceCache | None = None
        self._base: list[Array] = []
        self._hits = self._misses = self._passes = 0
        # Give looked-up and scored sums the sharding of the batch: otherwise a run that finds them in the cache would
        # compile other programs than the run that scored them.
        on_batch = functools.partial(jax.jit, out_shardings=batch_sharding(mesh))
        self._score = on_batch(
            lambda model, batch: score_in_micro_batches(model, batch, ScoringOptions(), count_micro_batches).split_logps
        )
        self._merge = on_batch(_merge)
        self._whole = on_batch(functools.partial(whole_completions, ld_alpha=ld_alpha))

    @property
    def statistics(self) -> ReferenceStatistics:
        """Hits, misses and passes so far, and what the cache holds now; does not wait for the devices."""
        return ReferenceStatistics(
            status="none" if self._reference is None else self._reference.status,
            hits=self._hits,
            misses=self._misses,
            passes=self._passes,
            stored=0 if self._cache is None else len(self._cache),
            cache_path=None if self._cache is None else self._cache.path,
        )

    @property
    def state(self) -> EasyDeLState | None:
        """The reference while it is live, else None."""
        return None if self._reference is None else self._reference.state

    @state.setter
    def state(self, state: EasyDeLState) -> None:
        if self._reference is None:
            raise ValueError("this run keeps no reference, so there is none to replace: its options need none.")
        self.flush()
        self._reference.replace(state)
        self._cache = None

    @property
    def is_initial_policy(self) -> bool:
        """True if the reference is the initial policy: the model before the first update."""
        return self._reference is not None and self._reference.is_initial_policy

    def model(self, policy: EasyDeLBaseModule) -> EasyDeLBaseModule:
        """Return the weights to score with.

        Raises:
          ValueError: the run keeps no reference.
        """
        if self._reference is None:
            raise ValueError("this run keeps no reference, so it has no weights: its options need none.")
        return self._reference.model(policy)

    def offload(self) -> None:
        """Move the reference's weights to disk; a pair that is not cached restores them."""
        if self._reference is not None:
            self._reference.offload()

    def flush(self) -> None:
        """Store what was scored last, and free weights that were restored from disk.

        Raises:
          ReferenceCacheError: the cache's file cannot be used.
        """
        if self._reference is not None:
            self._reference.release()
        if self._cache is not None:
            self._cache.flush()

    def __call__(self, policy: EasyDeLBaseModule, batch: Batch, device_batch: DeviceBatch) -> LogProbs:
        """Look up or compute the summed log-probabilities of every slot's completions.

        Args:
          policy: the model in training; with adapters off it may be the reference.
          batch: as collated; without ``pair_keys`` nothing is looked up or kept.
          device_batch: the same on the devices.

        Returns:
          ``(chosen, rejected)`` in nats, float32 [rows, slots].

        Raises:
          ReferenceCacheError: the cache's file cannot be used.
        """
        if self._reference is None:
            zeros = jnp.zeros(batch["pair_mask"].shape, jnp.float32)
            return zeros, zeros
        if not self._is_cached or "pair_keys" not in batch:
            self._misses += int(np.count_nonzero(batch["pair_mask"]))
            return self._whole(self.score(policy, device_batch))
        slots = _slots_by_key(batch)
        cache = self._cache_of(policy)
        known = cache.find(slots)
        self._hits += sum(len(slots[key]) for key in known)
        looked_up = _lay_out(batch, slots, known)
        on_device = put_batch(looked_up, self._mesh)
        if len(known) == len(slots):
            self._reference.release()
            return self._whole(on_device["split_logps"])
        scored = self.score(policy, device_batch)
        new = {key: same_pair[0] for key, same_pair in slots.items() if key not in known}
        self._misses += sum(len(slots[key]) for key in new)
        cache.store_later(new, scored)
        return self._whole(self._merge(scored, **on_device))

    def score(self, policy: EasyDeLBaseModule, device_batch: DeviceBatch) -> Float[Array, "rows slots 2 2"]:
        """Run a batch through the reference without the cache; returns `PairLogps.split_logps` of every slot."""
        self._passes += 1
        return self._score(self.model(policy), device_batch)

    def advice(self) -> str:
        """Return what an error should add if log-probs turn out wrong: empty, unless some were looked up."""
        if not self._hits or self._cache is None:
            return ""
        return f" The reference's log-probs were read from {self._cache.path}; remove that file and run again."

    def _cache_of(self, policy: EasyDeLBaseModule) -> ReferenceCache:
        """The cache of this reference; the first use computes the digest of its weights."""
        assert self._reference is not None  # a uniform reference has nothing to keep
        if self._reference.status == "shared":
            # LoRA never replaces base arrays, so a different array object means another model.
            base = jax.tree.leaves(policy.without_lora())
            if any(ours is not theirs for ours, theirs in zip(self._base, base)):
                self.flush()
                self._cache = None
            self._base = base
        if self._cache is None:
            self._cache = ReferenceCache(scorer_digest(self.model(policy)))
        return self._cache


@dataclasses.dataclass(frozen=True)
class DataToScore:
    """A set to run through the reference.

    Attributes:
      name: what the progress bar calls it.
      batches: as they will be trained or evaluated on.
      count: the number of batches; None if unknown.
      may_be_ready: whether it may bring its own log-probs, which are then left as they are.
    """

    name: str
    batches: Iterable[Batch]
    count: int | None = None
    may_be_ready: bool = False


def data_of_run(loaders: TrainerConfigureDataloaderOutput, total_steps: int, *, do_eval: bool) -> list[DataToScore]:
    """List the data that a run of `total_steps` updates reads: one pass over what it trains on, and evaluation sets."""
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
    """Fill the cache with every pair of some sets, then offload the reference's weights.

    Known pairs are not scored again: an interrupted fill resumes where it was.

    Args:
      scorer: scores the batches and keeps the cache.
      policy: the model in training; with adapters off it may be the reference.
      sets: the data to score.
      on_device: sends batches to the devices ahead of their use.
      show_progress: whether to show a progress bar for each set.

    Raises:
      ValueError: the training data brings log-probs of its own, or the batches have no ``pair_keys``.
    """
    try:
        for data in sets:
            label = f"reference log-probs of {data.name}"
            batches = track(data.batches, label, data.count) if show_progress else data.batches
            for batch, device_batch in on_device(batches):
                if "ref_chosen_logps" in batch and data.may_be_ready:
                    continue
                _check_can_be_precomputed(batch)
                scorer(policy, batch, device_batch)
    finally:
        scorer.flush()
    found = scorer.statistics
    logger.info(
        "%d pairs were scored by the reference, %d were known, in %s.", found.misses, found.hits, found.cache_path
    )
    scorer.offload()


def _check_can_be_precomputed(batch: Batch) -> None:
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


def _slots_by_key(batch: Batch) -> dict[bytes, list[int]]:
    """Map each pair's key to its slots, as indices into the flattened batch; a pair that comes twice has two."""
    slots: dict[bytes, list[int]] = {}
    keys = batch["pair_keys"].reshape(-1, batch["pair_keys"].shape[-1])
    for slot in np.flatnonzero(batch["pair_mask"]):
        slots.setdefault(keys[slot].tobytes(), []).append(int(slot))
    return slots


def _lay_out(
    batch: Batch, slots: Mapping[bytes, list[int]], known: Mapping[bytes, SplitLogps]
) -> dict[str, np.ndarray]:
    """Put known values into their slots, and say for every slot which slot's scored value it takes otherwise."""
    shape, size = batch["pair_mask"].shape, batch["pair_mask"].size
    split_logps, is_known = np.zeros((size, 4), np.float32), np.zeros(size, np.bool_)
    first = np.arange(size, dtype=np.int32)
    for key, same_pair in slots.items():
        # A pair that comes twice takes the value of its first slot in both, as it will when both are looked up.
        first[same_pair] = same_pair[0]
        if key in known:
            split_logps[same_pair], is_known[same_pair] = known[key], True
    return {
        "split_logps": split_logps.reshape(*shape, 2, 2),
        "is_known": is_known.reshape(shape),
        "first": first.reshape(shape),
    }


def _merge(
    scored: Float[Array, "rows slots 2 2"],
    split_logps: Float[Array, "rows slots 2 2"],
    is_known: Bool[Array, "rows slots"],
    first: Int[Array, "rows slots"],
) -> Float[Array, "rows slots 2 2"]:
    return jnp.where(is_known[..., None, None], split_logps, scored.reshape(-1, 2, 2)[first])

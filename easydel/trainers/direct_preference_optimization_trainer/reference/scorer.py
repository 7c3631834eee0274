"""Reference log-probs for a batch: known ones from the cache, the others scored and then kept."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from easydel.data.batching.packing import Batch
from easydel.infra.base_module import EasyDeLBaseModule
from easydel.infra.base_state import EasyDeLState
from easydel.infra.mesh import batch_sharding, put_batch
from easydel.trainers.direct_preference_optimization_trainer.reference.cache import (
    Parts,
    ReferenceCache,
    scorer_digest,
)
from easydel.trainers.direct_preference_optimization_trainer.reference.reference import Reference
from easydel.trainers.direct_preference_optimization_trainer.scoring import (
    ScoringOptions,
    score_in_micro_batches,
    whole_completions,
)
from easydel.trainers.trainer_protocol import CountMicroBatches, DeviceBatch

LogProbs = tuple[Float[Array, "rows slots"], Float[Array, "rows slots"]]


class Pending(NamedTuple):
    """Values on their way to a cache: which slot, counted through the batch, holds those of which key."""

    cache: ReferenceCache
    slots: dict[bytes, int]
    parts: Float[Array, "rows slots 2 2"]


class ReferenceScorer:
    """Scores batches under a reference, each pair once.

    A pair's log-probs are those of the first time it was scored, in this run or an earlier one, so a run that was
    interrupted sees the numbers of one that was not. They are stored one batch late: by then they have been computed,
    and the devices are busy with the update that needed them.

    Args:
      reference: the model; None is a uniform one, whose log-probs count as 0, or none at all.
      mesh: where batches lie.
      ld_alpha: weight of the tokens beyond the shorter completion's length.
      count_micro_batches: micro-batches a batch is scored in, by its rows and their length.
      is_cached: whether log-probs are looked up and kept; the reference must stand still then.

    Attributes:
      found, scored: pairs looked up in the cache and pairs run through the reference, so far.
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
        self.found = self.scored = 0
        self._reference = reference
        self._mesh = mesh
        self._is_cached = is_cached
        self._cache: ReferenceCache | None = None
        self._base: list[Array] = []
        self._pending: Pending | None = None
        # Wherever the parts come from, they and what is made of them lie like the rest of the batch: else a start that
        # finds them would compile programs that the first one, which scored them, did not.
        on_batch = functools.partial(jax.jit, out_shardings=batch_sharding(mesh))
        self._score = on_batch(
            lambda model, batch: score_in_micro_batches(model, batch, ScoringOptions(), count_micro_batches).split_logps
        )
        self._merge = on_batch(_merge)
        self._whole = on_batch(functools.partial(whole_completions, ld_alpha=ld_alpha))

    def cache(self, policy: EasyDeLBaseModule) -> ReferenceCache:
        """The cache of this reference; the first use works out the digest of its weights."""
        assert self._reference is not None  # a uniform reference has nothing to keep
        if self._reference.is_policy:
            # Training leaves the arrays of a base alone, so another state's are other objects.
            base = jax.tree.leaves(policy.without_lora())
            if any(ours is not theirs for ours, theirs in zip(self._base, base)):
                self._cache = None
            self._base = base
        if self._cache is None:
            self._cache = ReferenceCache(scorer_digest(self.model(policy)))
        return self._cache

    def model(self, policy: EasyDeLBaseModule) -> EasyDeLBaseModule:
        """The weights to score with.

        Raises:
          ValueError: there is no model.
        """
        if self._reference is None:
            raise ValueError("this run keeps no reference, so it has no weights: its options need none.")
        return self._reference.model(policy)

    @property
    def state(self) -> EasyDeLState | None:
        """The reference, where it is on the devices."""
        return None if self._reference is None else self._reference.state

    @state.setter
    def state(self, state: EasyDeLState) -> None:
        if self._reference is None:
            raise ValueError("this run keeps no reference, so there is none to replace: its options need none.")
        self.store_pending()
        self._reference.state, self._cache = state, None

    @property
    def is_start(self) -> bool:
        """Whether the reference is the policy's own start."""
        return self._reference is not None and self._reference.is_start

    def put_aside(self) -> None:
        """Let go of the reference's weights; they are read back from disk where a pair is not known."""
        if self._reference is not None:
            self._reference.put_aside()

    def __call__(self, policy: EasyDeLBaseModule, batch: Batch, device_batch: DeviceBatch) -> LogProbs:
        """Summed log-probabilities of every slot's completions, in nats, float32.

        Args:
          policy: the model in training, which is the reference where its adapters are off.
          batch: as collated; without ``pair_keys`` nothing is looked up or kept.
          device_batch: the same on the devices.

        Raises:
          ReferenceCacheError: the cache's file cannot be used.
        """
        if self._reference is None:
            zeros = jnp.zeros(batch["pair_mask"].shape, jnp.float32)
            return zeros, zeros
        if not self._is_cached or "pair_keys" not in batch:
            self.scored += int(np.count_nonzero(batch["pair_mask"]))
            return self._whole(self._score(self.model(policy), device_batch))
        self.store_pending()
        slots = _slots_by_key(batch)
        cache = self.cache(policy)
        known = cache.find(slots)
        self.found += sum(len(slots[key]) for key in known)
        looked_up = _lay_out(batch, slots, known)
        on_device = put_batch(looked_up, self._mesh)
        if len(known) == len(slots):
            self._reference.give_back()
            return self._whole(on_device["parts"])
        scored = self._score(self.model(policy), device_batch)
        new = {key: places[0] for key, places in slots.items() if key not in known}
        self.scored += sum(len(slots[key]) for key in new)
        self._pending = Pending(cache, new, scored)
        return self._whole(self._merge(scored, **on_device))

    def advice(self) -> str:
        """What to do where log-probs turn out wrong: nothing to say, unless they were looked up."""
        if not self.found or self._cache is None:
            return ""
        return f" The reference's log-probs were read from {self._cache.path}; remove that file and run again."

    @contextlib.contextmanager
    def settled(self) -> Iterator[None]:
        """At the end, however it comes: store what is on its way, let go of weights read back from disk."""
        try:
            yield
        finally:
            self.store_pending()
            if self._reference is not None:
                self._reference.give_back()

    def store_pending(self) -> None:
        """Store what was scored last; the next call does so by itself."""
        if self._pending is None:
            return
        (cache, slots, on_device), self._pending = self._pending, None
        parts = np.asarray(on_device).reshape(-1, 4)
        # What is not finite is a fault that somebody is about to mend, not a property of the pair.
        finite = np.isfinite(parts).all(axis=1)
        cache.store((key, tuple(parts[slot].tolist())) for key, slot in slots.items() if finite[slot])


def _slots_by_key(batch: Batch) -> dict[bytes, list[int]]:
    """The places, counted through the batch, of every pair; a pair that comes twice has two."""
    slots: dict[bytes, list[int]] = {}
    keys = batch["pair_keys"].reshape(-1, batch["pair_keys"].shape[-1])
    for place in np.flatnonzero(batch["pair_mask"]):
        slots.setdefault(keys[place].tobytes(), []).append(int(place))
    return slots


def _lay_out(batch: Batch, slots: Mapping[bytes, list[int]], known: Mapping[bytes, Parts]) -> dict[str, np.ndarray]:
    """Known values where they belong, and where each slot finds a scored one."""
    shape = batch["pair_mask"].shape
    size = batch["pair_mask"].size
    parts, is_known, first = np.zeros((size, 4), np.float32), np.zeros(size, np.bool_), np.arange(size, dtype=np.int32)
    for key, places in slots.items():
        # Of a pair that comes twice the first one counts for both, as it will when both are looked up.
        first[places] = places[0]
        if key in known:
            parts[places], is_known[places] = known[key], True
    return {
        "parts": parts.reshape(*shape, 2, 2),
        "is_known": is_known.reshape(shape),
        "first": first.reshape(shape),
    }


def _merge(
    scored: Float[Array, "rows slots 2 2"],
    parts: Float[Array, "rows slots 2 2"],
    is_known: Bool[Array, "rows slots"],
    first: Int[Array, "rows slots"],
) -> Float[Array, "rows slots 2 2"]:
    return jnp.where(is_known[..., None, None], parts, scored.reshape(-1, 2, 2)[first])

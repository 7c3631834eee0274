"""Send batches to the devices ahead of their use, each with the data's position right after it."""

from __future__ import annotations

import collections
import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jax.sharding import Mesh

from easydel.infra.mesh import put_batch
from easydel.trainers.trainer_protocol import Batch, BatchIterator, DeviceBatch

BATCHES_AHEAD = 2


def on_device(
    batches: Iterable[Batch], mesh: Mesh, before_each: Callable[[], None]
) -> Iterator[tuple[Batch, DeviceBatch]]:
    """Yield batches with their copies on the devices, sent two ahead of their use.

    Args:
      batches: on the host.
      mesh: the devices.
      before_each: called before a batch is sent; what it raises reaches the caller.
    """
    ahead: collections.deque[tuple[Batch, DeviceBatch]] = collections.deque()
    for batch in batches:
        before_each()
        ahead.append((batch, put_batch(batch, mesh)))
        if len(ahead) > BATCHES_AHEAD:
            yield ahead.popleft()
    yield from ahead


def with_positions(
    batches: BatchIterator,
    count: int,
    send: Callable[[Iterable[Batch]], Iterator[tuple[Batch, DeviceBatch]]],
) -> Iterator[tuple[Batch, DeviceBatch, dict[str, Any]]]:
    """Yield at most `count` batches as `send` gives them, each with the data's position right after it.

    Args:
      batches: on the host; closed at the end.
      count: most batches to take.
      send: puts batches on the devices, in order, such as `on_device`.
    """
    positions: collections.deque[dict[str, Any]] = collections.deque()

    def remember_positions() -> Iterator[Batch]:
        for batch in itertools.islice(batches, count):
            positions.append(batches.position())
            yield batch

    with contextlib.closing(batches):
        for batch, device_batch in send(remember_positions()):
            yield batch, device_batch, positions.popleft()

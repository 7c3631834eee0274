"""Cache reference log-probs on disk: each pair is scored once per reference, whichever run asks."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
import sqlite3
import struct
import tempfile
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

from easydel.infra.base_module import EasyDeLBaseModule
from easydel.infra.cache_folder import cache_folder
from easydel.weights.fingerprint import model_digest

logger = logging.getLogger("easydel")

# Increase it whenever a change of the code gives the same weights and tokens other log-probs.
SCORING_VERSION = 3
# Four sums in nats (chosen up to the shorter completion's length and beyond it, then rejected), and a checksum.
VALUE = struct.Struct("<4fI")
FIND = "SELECT value FROM log_probs WHERE key = ?"
# Another process may be writing.
SECONDS_TO_WAIT = 60.0

SplitLogps = tuple[float, ...]
Got = TypeVar("Got")


class ReferenceCacheError(RuntimeError):
    """The file of cached reference log-probs cannot be used; names it and what to do."""


def scorer_digest(model: EasyDeLBaseModule) -> str:
    """Return the hex digest of all that determines a pair's log-probs: weights, shape, arithmetic."""
    (device, *_) = jax.tree.leaves(model)[0].devices()
    arithmetic = [
        SCORING_VERSION,
        device.device_kind,
        jax.config.values["jax_default_matmul_precision"],
    ]
    described = json.dumps([model_digest(model), arithmetic], sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()


class ReferenceCache:
    """The log-probs of one reference, by the key of the pair (`easydel.data.tree.PromptTree.key`).

    One SQLite file in the user's private cache folder. What is stored never changes, and is on disk when `store`
    returns, or `flush` after `store_later`. Threads and processes may share it: every call opens its own connection, in
    half a millisecond. If the disk is full or the file cannot be reached, one warning says so, and later log-probs are
    kept in memory.

    Args:
      digest: of the reference; see `scorer_digest`.
    """

    def __init__(self, digest: str):
        self._digest = digest.encode()
        # Key -> packed value of what could not be written.
        self._in_memory: dict[bytes, bytes] = {}
        self._off: set[str] = set()
        self._later: tuple[Mapping[bytes, int], Float[ArrayLike, "*slots 2 2"]] | None = None
        self.path = _folder_for(self) / f"{digest}.sqlite3"

    def find(self, keys: Iterable[bytes]) -> dict[bytes, SplitLogps]:
        """Look up the known ones of `keys`; flushes first.

        Returns:
          Key -> `PairLogps.split_logps` of the pair, four numbers in nats.

        Raises:
          ReferenceCacheError: the file is damaged or of another kind.
        """
        self.flush()
        keys = list(keys)

        def look_up(connection: sqlite3.Connection) -> dict[bytes, bytes]:
            rows = ((key, connection.execute(FIND, (key,)).fetchone()) for key in keys)
            return {key: row[0] for key, row in rows if row is not None}

        stored = self._unless_off("reading", look_up) or {}
        in_memory = {key: self._in_memory[key] for key in keys if key in self._in_memory}
        return {key: self._read(key, value) for key, value in (stored | in_memory).items()}

    def store(self, values: Iterable[tuple[bytes, SplitLogps]]) -> None:
        """Add pairs of key and value; a key that is known keeps its value.

        Raises:
          ReferenceCacheError: the file is damaged or of another kind.
        """
        rows = [(key, VALUE.pack(*logps, self._checksum(key, logps))) for key, logps in values]

        def insert(connection: sqlite3.Connection) -> bool:
            with connection:
                connection.executemany("INSERT OR IGNORE INTO log_probs VALUES (?, ?)", rows)
            return True

        if not self._unless_off("writing", insert):
            for key, value in rows:
                self._in_memory.setdefault(key, value)

    def store_later(self, slots: Mapping[bytes, int], values: Float[ArrayLike, "*slots 2 2"]) -> None:
        """Store at the next `flush`, so that nothing waits for values that the device is still computing.

        Args:
          slots: key -> index of the slot of `values`, flattened, that holds its log-probs.
          values: `PairLogps.split_logps`, in nats.
        """
        self.flush()
        self._later = slots, values

    def flush(self) -> None:
        """Store what `store_later` took.

        Raises:
          ReferenceCacheError: the file is damaged or of another kind.
        """
        if self._later is None:
            return
        (slots, on_device), self._later = self._later, None
        values = np.asarray(on_device).reshape(-1, 4)
        # Do not keep non-finite values: they come from a fault to be mended, not from the pair.
        is_finite = np.isfinite(values).all(axis=1)
        self.store((key, tuple(values[slot].tolist())) for key, slot in slots.items() if is_finite[slot])

    def __len__(self) -> int:
        """The number of pairs that can be found: on disk, of this run and of earlier ones, and in memory."""

        def count(connection: sqlite3.Connection) -> int:
            return connection.execute("SELECT count(*) FROM log_probs").fetchone()[0]

        return (self._unless_off("reading", count) or 0) + len(self._in_memory)

    def _unless_off(self, use: str, action: Callable[[sqlite3.Connection], Got]) -> Got | None:
        """The result of `action`; None once the disk, not the content, has failed in this use."""
        if use in self._off:
            return None
        try:
            with self._open() as connection:
                return action(connection)
        except _Unreachable as error:
            if not self._off:
                logger.warning(
                    "reference log-probs are kept for this run only: %s cannot be used (%s).", self.path, error
                )
            self._off.add(use)
            return None

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            _make_private(self.path)
            # The rollback journal, not the write-ahead log: that one breaks when home folders are shared over NFS,
            # and is no faster here.
            with contextlib.closing(
                sqlite3.connect(self.path, timeout=SECONDS_TO_WAIT, isolation_level="IMMEDIATE")
            ) as connection:
                connection.execute(
                    "CREATE TABLE IF NOT EXISTS log_probs (key BLOB PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID"
                )
                yield connection
        except (sqlite3.OperationalError, OSError) as error:
            raise _Unreachable(str(error)) from error
        except sqlite3.Error as error:
            raise self._unusable(str(error)) from error

    def _read(self, key: bytes, value: bytes) -> SplitLogps:
        if isinstance(value, bytes) and len(value) == VALUE.size:
            *logps, checksum = VALUE.unpack(value)
            if checksum == self._checksum(key, logps):
                return tuple(logps)
        raise self._unusable("a value was changed, or belongs to another reference")

    def _checksum(self, key: bytes, logps: Iterable[float]) -> int:
        return zlib.crc32(self._digest + key + struct.pack("<4f", *logps))

    def _unusable(self, reason: str) -> ReferenceCacheError:
        return ReferenceCacheError(
            f"the cached reference log-probs in {self.path} cannot be used: {reason}. If the file is damaged, remove "
            "it; they are computed again. To keep them elsewhere, set XDG_CACHE_HOME."
        )


class _Unreachable(OSError):
    """The disk is full, the file cannot be written or read, or another process keeps it locked."""


def _make_private(path: Path) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.touch(mode=0o600)


def _folder_for(cache: ReferenceCache) -> Path:
    try:
        folder = cache_folder() / "reference-log-probs"
        folder.mkdir(mode=0o700, exist_ok=True)
        # Make a file: nothing else shows whether files can be made.
        tempfile.TemporaryFile(dir=folder).close()
        return folder
    except OSError as error:
        logger.warning("reference log-probs are kept for this run only: %s.", str(error))
        folder = Path(tempfile.mkdtemp(prefix="easydel-"))
        weakref.finalize(cache, shutil.rmtree, folder, ignore_errors=True)
        return folder

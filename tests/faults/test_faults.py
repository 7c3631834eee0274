"""A short campaign of faults; `python -m tests.faults` runs the whole one."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterator

import pytest

from tests.faults.campaign import (
    FAULTY,
    Trial,
    damages,
    empty_folder_beside,
    full_disk,
    kills,
    lock_left_behind,
    read_only,
    two_at_once,
)
from tests.faults.runs import Ground

pytestmark = pytest.mark.slow

FAULTS: dict[str, Callable[[Ground], Iterator[Trial]]] = {
    "killed": lambda ground: kills(ground, "plain", signal.SIGKILL, 2, random.Random(0)),
    "terminated": lambda ground: kills(ground, "adapters", signal.SIGTERM, 1, random.Random(1)),
    "interrupted": lambda ground: kills(ground, "synced reference", signal.SIGINT, 1, random.Random(2)),
    "damaged files": lambda ground: damages(ground, "plain", 12, random.Random(3)),
    "an empty or half-written checkpoint": empty_folder_beside,
    "a lock left behind": lock_left_behind,
    "two processes": two_at_once,
    "a full disk": full_disk,
    "a read-only folder": read_only,
}


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Ground:
    return Ground(tmp_path_factory.mktemp("faults") / "ground")


@pytest.mark.parametrize("fault", FAULTS)
def test_nothing_is_lost_and_nothing_passes_in_silence(fault, ground):
    trials = list(FAULTS[fault](ground))
    assert trials
    assert [trial for trial in trials if trial.outcome in FAULTY] == []

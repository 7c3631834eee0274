"""Which part of the model an update's time went into, from a trace of `jax.profiler` and the compiled program."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from jax.profiler import ProfileData

_LAYERS = r"\n[^\n]*/(modules|layers)/\w+\.py"
# The first whose pattern is found takes an operation: in its name, then the files of its call stack from the innermost,
# one a line.
PARTS = {
    "attention": r"/ops/attention/",
    # A backward pass that is written by hand has the line where the function is called.
    "head": r"/ops/linear_log_probs|transpose\([^\n]*\n[^\n]*/scoring\.py",
    "optimiser": r"/optax/|/infra/base_state\.py|/trainers/optimizers\.py",
    "products of the layers": rf"\A[^\n]*dot_general{_LAYERS}",
    "kept and fetched": rf"\A[^\n]*dynamic_(update_)?slice{_LAYERS}",
    "norms, activations, rotations": rf"\A[^\n]*{_LAYERS}",
    "all else": "",
}
# They last as long as what is in them, which has events of its own.
CONTAINERS = re.compile(r"(while|conditional|call)\b")


class Origin(NamedTuple):
    """Where an operation of a compiled program comes from."""

    part: str
    is_backward: bool


class Event(NamedTuple):
    """One execution of an operation, in nanoseconds."""

    operation: str
    start: float
    end: float


def origins(program: str) -> dict[str, Origin]:
    """Operations of a compiled program's text -> their origins."""
    files = dict(re.findall(r'^(\d+) "([^"]*)"$', _section(program, "FileNames"), re.M))
    locations = dict(re.findall(r"^(\d+) \{file_name_id=(\d+)", _section(program, "FileLocations"), re.M))
    frames = {
        frame: (files[locations[location]], parent)
        for frame, location, parent in re.findall(
            r"^(\d+) \{file_location_id=(\d+) parent_frame_id=(\d+)", _section(program, "StackFrames"), re.M
        )
    }
    found = {}
    operation = re.compile(r'^ +(?:ROOT )?%?([\w.\-]+) = .*metadata=\{op_name="([^"]*)"(?:[^}]*stack_frame_id=(\d+))?')
    for line in program.splitlines():
        if match := operation.match(line):
            name, path, frame = match.groups()
            about = "\n".join([path, *_stack(frames, frame)])
            part = next(part for part, pattern in PARTS.items() if re.search(pattern, about))
            found[name] = Origin(part, "transpose(" in path)
    return found


def _section(program: str, title: str) -> str:
    return program.partition(f"\n{title}\n")[2].partition("\n\n")[0]


def _stack(frames: Mapping[str, tuple[str, str]], frame: str | None) -> Iterable[str]:
    """Files from the innermost frame out; the outermost frame is its own parent."""
    while frame in frames:
        file, parent = frames[frame]
        yield file
        frame = None if parent == frame else parent


def events(folder: Path, operations: Iterable[str]) -> list[Event]:
    """Executions of the operations in the newest trace below a folder.

    Raises:
      FileNotFoundError: there is no trace.
    """
    traces = sorted(folder.rglob("*.xplane.pb"))
    if not traces:
        raise FileNotFoundError(f"{folder} holds no *.xplane.pb; was it written by jax.profiler.trace?")
    wanted = {operation for operation in operations if not CONTAINERS.match(operation)}
    return [
        Event(event.name, event.start_ns, event.start_ns + event.duration_ns)
        for plane in ProfileData.from_file(str(traces[-1])).planes
        for line in plane.lines
        for event in line.events
        if event.name in wanted
    ]


def seconds_by_operation(executions: Iterable[Event]) -> Counter[str]:
    """Seconds of each operation; a moment in which several run is split evenly between them."""
    edges = sorted(
        edge for event in executions for edge in ((event.start, 1, event.operation), (event.end, -1, event.operation))
    )
    seconds: Counter[str] = Counter()
    running: Counter[str] = Counter()
    before = 0.0
    for moment, change, operation in edges:
        if running:
            share = (moment - before) / 1e9 / running.total()
            for name, times in running.items():
                seconds[name] += share * times
        before = moment
        running[operation] += change
        if not running[operation]:
            del running[operation]
    return seconds

"""Inputs are bytes or JSON, so that each of them can be saved, read back and tried again."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

# Values that JSON cannot hold, or that would be long: {TAG: [kind, argument, ...]}.
TAG = "$made"

HOSTILE_TEXTS = ["", " ", "\n", "\x00", "\x1b[31mred\x1b[0m", "\ud800", "\u202e", "../../etc/passwd", "/etc/passwd"]
HOSTILE_TEXTS += ["x" * 3000]
HOSTILE_NUMBERS = [0, -1, 1, 2**31, 2**63, 2**64, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf")]
HOSTILE_VALUES = [
    None,
    True,
    False,
    *HOSTILE_TEXTS,
    *HOSTILE_NUMBERS,
    [],
    {},
    [[]],
    [None],
    {"": None},
    {"a": {"b": []}},
]


def made(*what: Any) -> dict[str, Any]:
    """A stand-in for a value that `revive` makes."""
    return {TAG: list(what)}


def revive(value: Any) -> Any:
    """The value with its stand-ins replaced by what they stand for."""
    if isinstance(value, list):
        return [revive(item) for item in value]
    if not isinstance(value, dict):
        return value
    if TAG in value:
        kind, *arguments = value[TAG]
        return MAKERS[kind](*arguments)
    return {key: revive(item) for key, item in value.items()}


def _nest(depth: int, kind: str) -> Any:
    value: Any = "end"
    for _ in range(depth):
        value = [value] if kind == "list" else {"a": value}
    return value


MAKERS: dict[str, Any] = {
    "nest": _nest,
    "repeat": lambda text, times: text * times,
    "digits": lambda count: 10 ** (count - 1),
    "bytes": bytes.fromhex,
    "array": lambda values, dtype: np.array(values, dtype=dtype),
    "scalar": lambda value, dtype: np.dtype(dtype).type(value),
    "keyed by number": lambda value: {1: value, None: value},
    "tuple": lambda *items: tuple(items),
}


def json_text(value: Any) -> str:
    """JSON as a file would hold it, stand-ins made; nests are written by hand, since the encoder cannot."""
    if isinstance(value, dict) and value.get(TAG, [None])[0] == "nest":
        depth, kind = value[TAG][1:]
        return ("[" if kind == "list" else '{"a":') * depth + '"end"' + ("]" if kind == "list" else "}") * depth
    if isinstance(value, dict) and TAG in value:
        kind, *arguments = value[TAG]
        return "1" + "0" * (arguments[0] - 1) if kind == "digits" else json.dumps(str(MAKERS[kind](*arguments)))
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)}: {json_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(json_text, value)) + "]"
    return json.dumps(value)


BIG_VALUES = [made("nest", 200, "list"), made("nest", 5000, "list"), made("nest", 5000, "dict"), made("digits", 5000)]


def mutate_bytes(data: bytes, seed: int) -> bytes:
    """A damaged copy: flipped bits, bytes set, runs cut out, doubled or overwritten, the end cut off."""
    rng, damaged = random.Random(seed), bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        if not damaged:
            break
        place, length = rng.randrange(len(damaged)), rng.choice((1, 2, 4, 8, 64))
        match rng.randrange(8):
            case 0 | 1:
                damaged[place] ^= 1 << rng.randrange(8)
            case 2:
                damaged[place] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, 0x0A, 0x0D, 0x22, rng.randrange(256)))
            case 3:
                del damaged[place : place + length]
            case 4:
                damaged[place:place] = damaged[place : place + length]
            case 5:
                damaged[place : place + length] = rng.choice((b"\xff", b"\x00", b"\x7f")) * length
            case 6:
                del damaged[place:]
            case 7:
                other = rng.randrange(len(damaged))
                damaged[place : place + length] = damaged[other : other + length]
    return bytes(damaged)


def mutate_json(value: Any, seed: int, extra: list[Any] | None = None) -> Any:
    """A copy with one to three of its parts replaced, dropped, renamed, doubled or wrapped."""
    rng, value = random.Random(seed), copy.deepcopy(value)
    choices = [*HOSTILE_VALUES, *BIG_VALUES, *(extra or [])]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        containers = [found for found in _containers(value) if found]
        if not containers:
            return copy.deepcopy(rng.choice(choices))
        container = rng.choice(containers)
        key = rng.choice(list(container) if isinstance(container, dict) else range(len(container)))
        match rng.randrange(8):
            case 0:
                del container[key]
            case 1:
                container[key] = [container[key]]
            case 2 if isinstance(container, dict):
                container[rng.choice(HOSTILE_TEXTS)] = container.pop(key)
            case 3 if isinstance(container[key], str):
                container[key] = _mutate_text(container[key], rng)
            case 3 if isinstance(container[key], (int, float)):
                container[key] = container[key] * rng.choice((-1, 2, 0.5, 1000))
            case 4:
                container[key] = str(container[key])
            case _:
                container[key] = copy.deepcopy(rng.choice(choices))
    return value


def _mutate_text(text: str, rng: random.Random) -> str:
    return mutate_bytes(text.encode("utf-8", "surrogatepass"), rng.getrandbits(32)).decode("utf-8", "replace")


def _containers(value: Any) -> list[Any]:
    if isinstance(value, dict) and TAG in value:
        return []
    inside = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    own = [value] if isinstance(value, (dict, list)) else []
    return own + [found for item in inside for found in _containers(item)]


SEEDS = st.integers(0, 2**64 - 1)


def damaged(*originals: bytes) -> st.SearchStrategy[bytes]:
    """Damaged copies of these files, and now and then one of them whole."""
    return st.builds(mutate_bytes, st.sampled_from(originals), SEEDS) | st.sampled_from(originals)


def bent(*originals: Any, extra: list[Any] | None = None) -> st.SearchStrategy[Any]:
    """Copies of these JSON values with a few parts changed."""
    return st.builds(mutate_json, st.sampled_from(originals), SEEDS, st.just(extra))


def encode(given: Any) -> bytes:
    """An input as its saved file holds it."""
    return given if isinstance(given, bytes) else json.dumps(given).encode()


def read_saved(path: Path) -> Any:
    """An input from its saved file."""
    data = path.read_bytes()
    return data if path.suffix == ".bin" else json.loads(data)

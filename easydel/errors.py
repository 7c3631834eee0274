"""Write problems and values of any origin into messages, shortened and without control characters."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Sequence
from typing import Any

# C0 except newline and tab, DEL and C1, then characters without width or that change the direction of writing, half
# surrogates (which no terminal can encode) and the invisible tags.
HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e"
    "\u2060-\u206f\u3164\ud800-\udfff\ufeff\uffa0\ufff0-\ufffb\U000e0000-\U000e0fff]+"
)


def listed(problems: Sequence[str], most: int = 20) -> str:
    """One problem per line, indented; of many, the first `most` and the number of the others.

    Example:
      >>> listed(["a is missing", "b is missing", "c is missing"], most=1)
      'a is missing\\n  and 2 more'
    """
    more = [f"and {len(problems) - most} more"] if len(problems) > most else []
    return "\n  ".join([*problems[:most], *more])


def shown(value: Any, longest: int = 60) -> str:
    """A value as JSON text on one short line, control characters escaped."""
    try:
        text = json.dumps(value)
    except (RecursionError, TypeError, ValueError):  # nested too deep, no JSON, or a number of thousands of digits
        text = f"a {type(value).__name__} that is too large to show"
    return shortened(text, longest)


def plain(name: str, longest: int = 100) -> str:
    """A name from a file: as it is where it is short and printable, else as `shown`."""
    return name if name.isprintable() and len(name) <= longest else shown(name, longest)


def brief(value: object, longest: int = 80) -> str:
    """A value on one short line: text as it is, anything else as Python writes it, control characters escaped."""
    text = visible(value if isinstance(value, str) else short_repr(value))
    return shortened(text.replace("\n", "\\n").replace("\t", "\\t"), longest)


def shortened(text: str, longest: int, tail: int = 0) -> str:
    """A text cut to `longest` characters at its end, or in its middle where `tail` characters of the end stay.

    Example:
      >>> shortened("a long message", 6)
      'a long…'
    """
    if len(text) <= longest:
        return text
    return f"{text[: longest - tail]} […] {text[-tail:]}" if tail else f"{text[:longest]}…"


class _Repr(reprlib.Repr):
    """`reprlib` that describes integers of more digits than Python is willing to write."""

    def repr_int(self, x: int, level: int) -> str:
        return super().repr_int(x, level) if x.bit_length() < 10_000 else f"of {x.bit_length()} bits"


short_repr = _Repr().repr


def visible(text: str) -> str:
    """The text with each hidden character written as its escape, such as ``\\x1b``; newlines and tabs stay."""
    return HIDDEN.sub(lambda found: _escaped(found.group()), text)


def _escaped(characters: str) -> str:
    return "".join(
        f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
        for code in map(ord, characters)
    )

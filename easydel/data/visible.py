"""Make control characters visible: text of a row or a file must not steer the terminal that prints it."""

from __future__ import annotations

import re

# C0 but for newline and tab, DEL and C1, then what has no width or changes the direction of writing, half surrogates
# (which no terminal can encode) and the invisible tags.
HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e"
    "\u2060-\u206f\u3164\ud800-\udfff\ufeff\uffa0\ufff0-\ufffb\U000e0000-\U000e0fff]+"
)


def visible(text: str) -> str:
    """The text with each hidden character written as its escape, such as ``\\x1b``; newlines and tabs stay."""
    return HIDDEN.sub(lambda found: _escaped(found.group()), text)


def _escaped(characters: str) -> str:
    return "".join(
        f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
        for code in map(ord, characters)
    )

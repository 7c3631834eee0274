"""What a pair is known by: a digest of its tokens, wherever and in whatever layout it turns up."""

from __future__ import annotations

import hashlib

import numpy as np

from easydel.data.preference.transform import PreferencePair

KEY_BYTES = 16


def pair_key(pair: PreferencePair) -> bytes:
    """Digest of all that a model reads and scores of a pair: three lists of token ids, two loss masks."""
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids):
        # Lengths go in as well, so that moving a token from one part to the next is another pair.
        digest.update(ids.size.to_bytes(8, "little") + np.asarray(ids, "<i4").tobytes())
    for mask in (pair.chosen_loss_mask, pair.rejected_loss_mask):
        digest.update(np.asarray(mask, np.bool_).tobytes())
    return digest.digest()

"""The switches of an update, each turned by itself."""

from __future__ import annotations

import dataclasses

from easydel.ops.attention.tree_attention import AttentionBackend


@dataclasses.dataclass(frozen=True)
class Variant:
    """How one update is made; the defaults are what the others are compared with.

    Attributes:
      attention_backend: of the model; None is the one made for the device.
      share_prompt, packing: as in `DPOConfig`.
      checkpointing: layers are rebuilt in the backward pass.
      micro_batch_tokens: `micro_batch_tokens` of `DPOConfig`, 8192 by default on an accelerator.
      known_reference: the reference's log-probs are at hand, as from the cache, and its weights are not kept.
    """

    attention_backend: AttentionBackend | None = None
    share_prompt: bool = True
    packing: bool = True
    checkpointing: bool = True
    micro_batch_tokens: int = 8192
    known_reference: bool = False


VARIANTS = {
    "as compared": Variant(),
    "attention by XLA": Variant(attention_backend="xla"),
    "prompts not shared": Variant(share_prompt=False),
    "one pair a row": Variant(packing=False),
    "one pair a row, prompts not shared": Variant(share_prompt=False, packing=False),
    "products kept": Variant(checkpointing=False),
    "2048 tokens at once": Variant(micro_batch_tokens=2048),
    "reference known": Variant(known_reference=True),
}

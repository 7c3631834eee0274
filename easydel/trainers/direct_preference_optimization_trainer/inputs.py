"""Do the arguments of the trainer fit each other?"""

from __future__ import annotations

import logging
from typing import Any

from easydel.infra.base_module import EasyDeLBaseModule
from easydel.trainers.direct_preference_optimization_trainer.dpo_config import DPOConfig

logger = logging.getLogger("easydel")


def refuse_layout_options(arguments: DPOConfig) -> None:
    """Refuse options of the layout beside a data_collator, which makes its own."""
    for option in ("packing", "share_prompt"):
        if not getattr(arguments, option):
            raise ValueError(
                f"{option}=False has no effect with a data_collator, which lays out the batch by itself; leave one of "
                "the two out."
            )


def warn_of_length(max_length: int | None, model: EasyDeLBaseModule) -> None:
    """Say so where rows may be longer than anything the model was made for."""
    longest = model.config.max_position_embeddings
    if max_length is None or max_length > longest:
        logger.warning(
            "max_length=%s, but the model was made for %d positions (max_position_embeddings in config.json); "
            "longer rows are outside what it has learnt.",
            max_length,
            longest,
        )


def tokenizer_of(processing_class: Any) -> Any:
    """The tokenizer itself, or that of a processor."""
    is_processor = hasattr(processing_class, "tokenizer") and not hasattr(processing_class, "pad_token_id")
    return processing_class.tokenizer if is_processor else processing_class


def padding_value_of(arguments: DPOConfig, tokenizer: Any) -> int:
    """The token id that fills rows: the option's, else the tokenizer's pad token.

    Raises:
      ValueError: there is neither; says how to set one.
    """
    if arguments.padding_value is not None:
        return arguments.padding_value
    if tokenizer.pad_token_id is None:
        raise ValueError(
            "the tokenizer has no pad token and padding_value is None. Set padding_value in DPOConfig to any token id "
            "(padding is never read, so the end-of-text id will do), or tokenizer.pad_token."
        )
    return tokenizer.pad_token_id

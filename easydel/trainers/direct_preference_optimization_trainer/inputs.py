"""Check that the trainer's arguments fit together."""

from __future__ import annotations

import logging
from typing import Any

from easydel.infra.base_module import EasyDeLBaseModule
from easydel.trainers.direct_preference_optimization_trainer.dpo_config import DPOConfig

logger = logging.getLogger("easydel")


def refuse_layout_options(arguments: DPOConfig) -> None:
    """Refuse options of the layout beside a data_collator, which makes its own layout.

    Raises:
      ValueError: `packing` or `share_prompt` is False.
    """
    for option in ("packing", "share_prompt"):
        if not getattr(arguments, option):
            raise ValueError(
                f"{option}=False has no effect with a data_collator, which lays out the batch by itself; leave one of "
                "the two out."
            )


def refuse_log_probs_without_effect(arguments: DPOConfig) -> None:
    """Refuse data that brings reference log-probs that would not be used.

    Raises:
      ValueError: there is no reference, or it is uniform, or it follows the policy.
    """
    arguments.check_reference("ref_chosen_logps and ref_rejected_logps in the data have", "drop the columns")
    if arguments.sync_ref_model:
        raise ValueError(
            "sync_ref_model=True moves the reference, but the data brings fixed ref_chosen_logps and "
            "ref_rejected_logps; drop the columns or set sync_ref_model=False."
        )


def warn_of_length(max_length: int | None, model: EasyDeLBaseModule) -> None:
    """Warn if rows may be longer than the model's ``max_position_embeddings``."""
    longest = model.config.max_position_embeddings
    if max_length is None or max_length > longest:
        logger.warning(
            "max_length=%s, but the model was made for %d positions (max_position_embeddings in config.json); "
            "the model has not learnt from longer rows.",
            max_length,
            longest,
        )


def tokenizer_of(processing_class: Any) -> Any:
    """Return the tokenizer itself, or that of a processor.

    Raises:
      TypeError: it is neither.
    """
    is_processor = hasattr(processing_class, "tokenizer") and not hasattr(processing_class, "pad_token_id")
    tokenizer = processing_class.tokenizer if is_processor else processing_class
    if not hasattr(tokenizer, "pad_token_id"):
        raise TypeError(
            f"processing_class is {type(processing_class).__name__} {processing_class!r:.80}, expected a tokenizer or "
            "a processor that has one; load one with load_tokenizer."
        )
    return tokenizer


def padding_value_of(arguments: DPOConfig, tokenizer: Any, vocab_size: int) -> int:
    """Return the token id that fills rows: the option's, else the tokenizer's pad token.

    Raises:
      ValueError: there is neither, or the model has no such token; says how to set one.
    """
    ids = f"0 to {vocab_size - 1}"
    if arguments.padding_value is not None:
        if arguments.padding_value >= vocab_size:
            raise ValueError(f"padding_value={arguments.padding_value}, expected a token id of the model: {ids}.")
        return arguments.padding_value
    if tokenizer.pad_token_id is None:
        raise ValueError(
            "the tokenizer has no pad token and padding_value is None. Set padding_value in DPOConfig to any token id "
            "(padding is never read, so the end-of-text id will do), or tokenizer.pad_token."
        )
    if not 0 <= tokenizer.pad_token_id < vocab_size:
        raise ValueError(
            f"the tokenizer's pad token has id {tokenizer.pad_token_id}, but the model's tokens are {ids}: the pad "
            "token was added to the tokenizer alone, or processing_class is not this model's tokenizer. In the first "
            "case set padding_value in DPOConfig to a token id of the model (padding is never read, so the "
            "end-of-text id will do)."
        )
    return tokenizer.pad_token_id

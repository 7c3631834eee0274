"""Check JSON objects against an allow-list of keys: the values of each, and the other keys that are harmless."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from easydel.errors import listed, shown

REQUIRED = object()
LARGEST_INDEX = 2**31 - 1  # token ids and positions are int32

# Keys of config.json, by what they describe, of which no value changes the decoder's log-probs.
HARMLESS = {
    "the files and who wrote them": """
        architectures model_type torch_dtype dtype transformers_version name_or_path auto_map transformers.js_config
        model_name base_model is_llama_config trl_version""",
    "the tokenizer and the training of the original": """
        tokenizer_class prefix bos_token eos_token pad_token max_sequence_length model_max_length
        tokenizer_model_max_length tokenizer_padding_side seq_length neftune_noise_alpha gradient_checkpointing""",
    "how another program runs the model": """
        use_cache pretraining_tp return_dict output_hidden_states output_attentions output_scores
        return_dict_in_generate torchscript use_bfloat16 tf_legacy_loss chunk_size_feed_forward attn_implementation
        use_flash_attention_2 flash_attention remove_invalid_values is_decoder tie_encoder_decoder
        dual_chunk_attention_config tensor_parallel""",
    "sampling": """
        max_length min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups diversity_penalty
        temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
        encoder_no_repeat_ngram_size bad_words_ids num_return_sequences exponential_decay_length_penalty
        suppress_tokens begin_suppress_tokens""",
    "classifiers": "finetuning_task id2label label2id num_labels problem_type task_specific_params",
}
HARMLESS_NAMES = frozenset(name for names in HARMLESS.values() for name in names.split())
# Private keys of transformers (_name_or_path, …), keys that unsloth adds, and the ids of special tokens.
HARMLESS_PATTERN = re.compile(r"_.*|unsloth_.*|.*_token_ids?", re.DOTALL)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Key:
    """The values that a key of a file, or an argument, may hold.

    Attributes:
      expected: the values in words, for the error.
      accepts: tells whether a value is one of them.
      default: value of an absent key; `REQUIRED` where the key must be there.
      null: value of null; `REQUIRED` where null is an error.
    """

    expected: str
    accepts: Callable[[Any], bool]
    default: Any = REQUIRED
    null: Any = REQUIRED


def whole(low: int, high: int, **options: Any) -> Key:
    """A whole number in a range, both ends included."""
    return Key(
        expected=f"a whole number from {low} to {high}",
        accepts=lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high,
        **options,
    )


def number(low: float, high: float, **options: Any) -> Key:
    """A finite number in a range, both ends included."""
    return Key(
        expected=f"a number from {low:g} to {high:g}",
        # Compare before anything converts to float: JSON holds whole numbers of any size.
        accepts=lambda value: isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high,
        **options,
    )


def switch(default: bool) -> Key:
    """A switch, true or false."""
    return Key(expected="true or false", accepts=lambda value: isinstance(value, bool), default=default)


def text() -> Key:
    """A string that may be left out."""
    return Key(expected="text", accepts=lambda value: isinstance(value, str), default=None, null=None)


def mapping() -> Key:
    """A JSON object that may be left out."""
    return Key(expected="a JSON object", accepts=lambda value: isinstance(value, dict), default=None, null=None)


def only(*values: Any) -> Key:
    """A setting of which the decoder computes only these values; absence and null mean the first."""
    return Key(
        expected=f"{' or '.join(map(shown, values))}; this decoder computes nothing else",
        accepts=lambda value: any(
            value == known and isinstance(known, bool | str) == isinstance(value, bool | str) for known in values
        ),
        default=values[0],
        null=values[0],
    )


def read_keys(raw: Mapping[str, Any], keys: Mapping[str, Key], label: str) -> dict[str, Any]:
    """The values of `keys`, each checked for type and range; an unread key must be harmless, null or empty.

    Args:
      raw: the JSON object.
      keys: the allow-list.
      label: name of the object for the error, e.g. "config.json".

    Raises:
      ValueError: lists every key that is missing, wrong, or not read though its value could change the computation.
    """
    values, problems = {}, []
    for name, key in keys.items():
        value = raw.get(name)
        if value is not None and key.accepts(value):
            values[name] = value
        elif value is not None:
            problems.append(f'it has "{name}": {shown(value)}, expected {key.expected}')
        else:
            values[name] = key.null if name in raw else key.default
            if values[name] is REQUIRED:
                problems.append(f'it lacks "{name}"{" (null)" if name in raw else ""}, expected {key.expected}')
    problems += [
        f"it has {shown(name)}: {shown(value)}, which is not read here and could change what the model computes; "
        "remove the key if it does not"
        for name, value in raw.items()
        if name not in keys and not is_harmless(name) and not is_off(value)
    ]
    if problems:
        raise ValueError(f"{label} cannot be used:\n  {listed(problems, most=3)}")
    return values


def is_harmless(name: str) -> bool:
    """True where no value of a key changes what the decoder computes."""
    return name in HARMLESS_NAMES or HARMLESS_PATTERN.fullmatch(name) is not None


def is_off(value: Any) -> bool:
    """True for a setting that is switched off: null, false, or empty."""
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)

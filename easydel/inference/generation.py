"""Sample tokens from a model, with a key-value cache."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from easydel.infra.language_model import KeyValueCache, LanguageModel
from easydel.ops.attention.inputs import TokenIds

# Prompts are padded to a multiple of this, so that prompts of similar length share one compilation.
PROMPT_MULTIPLE = 64


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop_token_ids: Sequence[int] = (),
    key: PRNGKeyArray | None = None,
) -> list[list[int]]:
    """Continue each prompt token by token.

    Args:
      model: the model to sample from.
      prompts: token ids, one list per prompt; lengths may differ.
      max_new_tokens: largest number of tokens to add to each prompt.
      temperature: 0 picks the likeliest token; above 0, logits are divided by it and sampled.
      top_p: sample among the likeliest tokens that together hold this probability.
      stop_token_ids: ids that end a continuation.
      key: draws the samples; required when `temperature` is above 0.

    Returns:
      The new token ids of each prompt, without the stop token.

    Raises:
      ValueError: a prompt is empty or holds a token id that the model does not have, or an option is out of range.

    References:
      Holtzman et al., The Curious Case of Neural Text Degeneration, 2019 (`top_p`).

    Example:
      >>> [len(tokens) for tokens in generate(model, [[5, 3], [7]], max_new_tokens=4)]
      [4, 4]
    """
    if len(prompts) == 0 or not all(len(prompt) for prompt in prompts):
        raise ValueError("generate needs at least one prompt, and every prompt at least one token.")
    size = model.config.vocab_size
    for token in (max(map(max, prompts)), min(map(min, prompts))):
        if not 0 <= token < size:
            raise ValueError(f"a prompt holds token id {token}; expected ids of the model's {size} tokens, from 0.")
    if max_new_tokens < 1 or not 0 <= temperature < math.inf or not 0 < top_p <= 1:
        raise ValueError(
            f"max_new_tokens={max_new_tokens}, temperature={temperature}, top_p={top_p}: "
            "expected at least 1, a finite number of at least 0, and above 0 up to 1."
        )
    if temperature > 0 and key is None:
        raise ValueError(f"temperature={temperature} samples, which needs `key`, e.g. jax.random.key(0).")
    longest = max(map(len, prompts))
    width = -(-longest // PROMPT_MULTIPLE) * PROMPT_MULTIPLE
    input_ids = np.zeros((len(prompts), width), np.int32)
    position_ids = np.full((len(prompts), width), -1, np.int32)
    for row, prompt in enumerate(prompts):  # padded on the left, so that every row's last token is in the last column
        input_ids[row, width - len(prompt) :] = prompt
        position_ids[row, width - len(prompt) :] = np.arange(len(prompt))
    tokens, lengths = _generate(
        model,
        input_ids,
        position_ids,
        jnp.array(list(stop_token_ids), jnp.int32),
        jnp.float32(temperature),
        jnp.float32(top_p),
        jax.random.key(0) if key is None else key,
        max_new_tokens,
    )
    return [row[:length].tolist() for row, length in zip(np.asarray(tokens), np.asarray(lengths))]


@functools.partial(jax.jit, static_argnames="max_new_tokens")
def _generate(
    model: LanguageModel,
    input_ids: Int[Array, "rows width"],
    position_ids: Int[Array, "rows width"],
    stop_ids: Int[Array, " stops"],
    temperature: Float[Array, ""],
    top_p: Float[Array, ""],
    key: PRNGKeyArray,
    max_new_tokens: int,
) -> tuple[Int[Array, "rows new"], Int[Array, " rows"]]:
    """New tokens, and the number of tokens of each row before its stop token."""
    rows, width = input_ids.shape
    cache: KeyValueCache | None = model.empty_cache(rows, width + max_new_tokens)
    hidden, cache, _ = model.hidden_states(input_ids, TokenIds.of_sequences(position_ids), cache=cache)

    def next_tokens(hidden, key):
        logits = model.logits(hidden)[:, -1]
        greedy = jnp.argmax(logits, axis=-1)
        scaled = _keep_top_p(logits / jnp.maximum(temperature, 1e-6), top_p)
        return jnp.where(temperature > 0, jax.random.categorical(key, scaled, axis=-1), greedy).astype(jnp.int32)

    def one_token(carry):
        step, tokens, lengths, done, hidden, cache = carry
        token = next_tokens(hidden, jax.random.fold_in(key, step))
        done |= jnp.isin(token, stop_ids)
        lengths = jnp.where(done, lengths, step + 1)
        tokens = tokens.at[:, step].set(token)
        positions = position_ids[:, -1:] + 1 + step
        hidden, cache, _ = model.hidden_states(token[:, None], TokenIds.of_sequences(positions), cache=cache)
        return step + 1, tokens, lengths, done, hidden[:, -1:], cache

    def unfinished(carry):
        step, _, _, done, _, _ = carry
        return (step < max_new_tokens) & ~jnp.all(done)

    start = (
        jnp.int32(0),
        jnp.zeros((rows, max_new_tokens), jnp.int32),
        jnp.zeros(rows, jnp.int32),
        jnp.zeros(rows, bool),
        hidden[:, -1:],
        cache,
    )
    _, tokens, lengths, *_ = jax.lax.while_loop(unfinished, one_token, start)
    return tokens, lengths


def _keep_top_p(logits: Float[Array, "rows vocab"], top_p: Float[Array, ""]) -> Float[Array, "rows vocab"]:
    """Logits with -inf for every token but the likeliest ones that together hold `top_p` of the probability."""
    descending = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(descending, axis=-1)
    kept = jnp.cumsum(probabilities, axis=-1) - probabilities < top_p
    smallest = jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= smallest, logits, -jnp.inf)

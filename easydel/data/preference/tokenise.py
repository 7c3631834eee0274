"""Turn text into token ids with character offsets, find cuts and stop tokens in them, and read a row's own ids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int32

from easydel.data.faults import BadRow, describe
from easydel.data.preference.json_values import is_list


class Tokenizer(Protocol):
    """The methods of a `transformers` fast tokenizer that this package uses; any object with these works."""

    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    all_special_ids: list[int]

    def __call__(self, text: str | list[str], *, add_special_tokens: bool, return_offsets_mapping: bool) -> Any:
        """A mapping with ``input_ids`` and ``offset_mapping`` (characters [start, end) of each token)."""
        ...

    def __len__(self) -> int:
        """Number of token ids, added ones included."""
        ...

    def apply_chat_template(
        self, messages: list, *, tokenize: bool, add_generation_prompt: bool, tools: list | None, **kwargs: Any
    ) -> str:
        """Render messages to text."""
        ...

    def decode(self, ids: list[int]) -> str:
        """The text of token ids."""
        ...

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        """Each token as the vocabulary writes it."""
        ...


@dataclass(frozen=True, slots=True)
class Encoding:
    """A text, its token ids, and the [start, end) characters of each token."""

    text: str
    ids: list[int]
    offsets: list[tuple[int, int]]

    def is_blank(self, token: int) -> bool:
        """True if the token at this position covers only white space."""
        start, end = self.offsets[token]
        return not self.text[start:end].strip()


class Encoder:
    """A tokenizer, with the properties that every row needs read once.

    Attributes:
      size: number of token ids, added ones included.
      bos_id, eos_id: None where the tokenizer has none.
      adds_bos: whether the tokenizer itself puts BOS before plain text.
      special_tokens: id -> text of the special tokens.

    Raises:
      BadRow: "unfit tokenizer", for one without character offsets.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.size = len(tokenizer)
        self.bos_id = tokenizer.bos_token_id
        self.eos_id = tokenizer.eos_token_id
        # Chat templates end a turn in special tokens that many a tokenizer does not list among its own; an object that
        # is no `transformers` tokenizer need not know of added tokens.
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special_ids = list({*tokenizer.all_special_ids, *(token for token, how in added.items() if how.special)})
        self.special_tokens = dict(zip(special_ids, tokenizer.convert_ids_to_tokens(special_ids), strict=True))
        probe = self._probe()
        self.adds_bos = self.bos_id is not None and list(probe["input_ids"][:1]) == [self.bos_id]

    def _probe(self) -> Any:
        try:
            probe = self._tokenizer("a", add_special_tokens=True, return_offsets_mapping=True)
            probe["offset_mapping"]
        except (NotImplementedError, KeyError, TypeError) as error:
            raise BadRow(
                "processing_class",
                "unfit tokenizer",
                f"{type(self._tokenizer).__name__} gives no character offsets ({error!r}), which are needed to tell "
                "prompt tokens from completion tokens. Load a fast tokenizer: AutoTokenizer.from_pretrained(...).",
                structural=True,
            ) from error
        return probe

    def encode(self, texts: Mapping[str, str]) -> tuple[Encoding, ...]:
        """Tokenise texts, each with exactly one BOS in front where the tokenizer or the text puts any there.

        The tokenizer is called once for all texts: it may then use several cores.

        Args:
          texts: column name -> text.

        Raises:
          BadRow: "bad value" for text that is not Unicode, naming its field.
        """
        for field, text in texts.items():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise BadRow(
                    field,
                    "bad value",
                    f'"{field}" or its prompt holds half a surrogate pair ({error}), which is not text. Mend the '
                    "encoding.",
                ) from error
        called = self._tokenizer(list(texts.values()), add_special_tokens=False, return_offsets_mapping=True)
        return tuple(map(self._with_one_bos, texts.values(), called["input_ids"], called["offset_mapping"]))

    def _with_one_bos(self, text: str, ids: list[int], offsets: list[tuple[int, int]]) -> Encoding:
        if self.adds_bos and self.bos_id is not None:
            ids, offsets = [self.bos_id, *ids], [(0, 0), *offsets]
        doubled = 0  # the text may bring a BOS of its own, or two
        while self.bos_id is not None and ids[doubled : doubled + 2] == [self.bos_id, self.bos_id]:
            doubled += 1
        return Encoding(text, ids[doubled:], offsets[doubled:])

    def first_token_past(self, encoding: Encoding, cut: int) -> int:
        """The first token that reaches beyond character `cut`; those before it lie wholly before the cut."""
        token = next((token for token, (_, end) in enumerate(encoding.offsets) if end > cut), len(encoding.offsets))
        # Behind a cut, only a space can belong to the token before it without showing in that token's offsets.
        if token > 0 and encoding.text[cut : cut + 1] == " " and self._untrimmed_end(encoding, token - 1) > cut:
            return token - 1
        return token

    def _untrimmed_end(self, encoding: Encoding, token: int) -> int:
        """The true end of a token: some byte-level tokenizers report "is " as covering only the "is"."""
        start, end = encoding.offsets[token]
        if start == end:  # nothing but spaces, reported as the position where they end
            return end
        return (
            end
            + _spaces_at_end(self._tokenizer.decode([encoding.ids[token]]))
            - _spaces_at_end(encoding.text[start:end])
        )

    def stop_token(
        self, encoding: Encoding, start: int, end: int, stop_ids: frozenset[int], words: tuple[int, int] | None
    ) -> int | None:
        """The position of the stop token that closes tokens [start, end): the first special one after the words.

        Where the characters of the words are not known, it is the first of the special tokens at the end. Special
        tokens before the words open a channel or a call, and are closed by as many after them.

        Args:
          encoding: the tokenised text.
          start, end: positions of the answer's tokens.
          stop_ids: token ids that may close it.
          words: [start, end) characters of the message's own text, if known.

        Returns:
          The position; None where no stop token closes the answer.
        """
        ids = encoding.ids
        special = [token for token in range(start, end) if ids[token] in stop_ids]
        written = [token for token in special if self._is_written_special(encoding, token)]
        if not written:
            return None
        behind = [token for token in written if words is not None and encoding.offsets[token][1] > words[1]]
        if not behind:
            behind = self._last_run(encoding, start, end, frozenset(written))
        if not behind:
            return None
        ahead = [token for token in written if token < behind[0]]
        if words is not None:
            ahead = [token for token in ahead if encoding.offsets[token][1] <= words[0]]
        groups = [next(group) for _, group in groupby(behind, key=lambda token: ids[token])]
        stop = groups[min(len(ahead), len(groups) - 1)]
        # The words may themselves end in what the template then writes once more.
        while (before := self._last_visible(encoding, start, stop)) is not None:
            if ids[before] != ids[stop]:
                break
            stop = before
        return stop

    def _last_run(self, encoding: Encoding, start: int, end: int, written: frozenset[int]) -> list[int]:
        """The positions of the special tokens after the last visible other token."""
        run: list[int] = []
        while (before := self._last_visible(encoding, start, run[-1] if run else end)) in written:
            run.append(before)
        return run[::-1]

    def _last_visible(self, encoding: Encoding, start: int, end: int) -> int | None:
        return next((token for token in range(end - 1, start - 1, -1) if not encoding.is_blank(token)), None)

    def _is_written_special(self, encoding: Encoding, token: int) -> bool:
        # An unknown character becomes the special token <unk>, which is not in the text.
        token_id = encoding.ids[token]
        start, end = encoding.offsets[token]
        return encoding.text[start:end].strip() == self.special_tokens.get(token_id)


def is_token_ids(value: object) -> bool:
    """Whether a value is a non-empty list or array of integers."""
    if isinstance(value, np.ndarray):
        return value.ndim > 0 and np.issubdtype(value.dtype, np.integer) and value.size > 0
    return is_list(value) and len(value) > 0 and isinstance(value[0], (int, np.integer))


def read_token_ids(value: object, field: str, vocabulary_size: int) -> Int32[np.ndarray, " tokens"]:
    """Read token ids that a row gives in place of text.

    Raises:
      BadRow: "missing value", "wrong type", "empty prompt" or "empty completion", or "bad value" for an id outside the
        vocabulary.
    """
    if value is None:
        raise BadRow(
            field, "missing value", f'"{field}" is None, but token-id rows need all three columns. Fill it in.'
        )
    if not is_list(value):
        raise BadRow(
            field,
            "wrong type",
            f'"{field}" is {describe(value)}, but another column holds token ids. Give all three as token ids.',
        )
    if len(value) == 0:
        raise BadRow(
            field,
            "empty prompt" if field == "prompt" else "empty completion",
            f'"{field}" holds no token ids, expected at least one.',
        )
    try:
        ids = np.asarray(value)
    except ValueError:  # lists of unequal length
        ids = np.empty((0, 0))
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise BadRow(field, "wrong type", f'"{field}" is {describe(value)}, expected one flat list of token ids.')
    if ids.min() < 0 or ids.max() >= vocabulary_size:
        outside = ids[(ids < 0) | (ids >= vocabulary_size)][0]
        raise BadRow(
            field,
            "bad value",
            f'"{field}" holds the token id {outside}, outside the tokenizer\'s 0 to {vocabulary_size - 1}. '
            "Use the tokenizer that made these ids.",
        )
    return ids.astype(np.int32)


def _spaces_at_end(text: str) -> int:
    return len(text) - len(text.rstrip(" "))

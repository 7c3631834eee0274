"""Render messages to text by a chat template, and find the characters of that text that carry loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

from easydel.data.faults import BadRow
from easydel.data.preference.messages import Message
from easydel.data.preference.shared_prompt import common_prefix_length
from easydel.data.preference.split import Answer, Rendering
from easydel.data.preference.template_check import Part, is_printed_by_python, parts_of, refuse_unseen
from easydel.data.preference.template_renderer import RowRenderer
from easydel.data.preference.tokenise import Tokenizer
from easydel.data.preference.tools import with_arguments_as_text


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template for one row.

    Attributes:
      tokenizer: the owner of the template.
      special_tokens: id -> text of the tokenizer's special tokens.
      renderer: renders with the row's tools and keyword arguments.
      context: tools and documents that the rendering must contain.
      content_as_parts: whether the template gets content as a list of parts rather than as text.
    """

    tokenizer: Tokenizer
    special_tokens: Mapping[int, str]
    renderer: RowRenderer
    context: Sequence[Part] = ()
    content_as_parts: bool = False

    def render(self, messages: list[Message], field: str, *, generation_prompt: bool = False) -> str:
        """Render a conversation to text; with `generation_prompt` it ends where the next answer begins.

        Args:
          messages: at least one.
          field: the column that a fault names.
          generation_prompt: adds the opening of the next answer.

        Raises:
          BadRow: "template error" with the template's own message, or "no chat template".
        """
        # Duck-typed tokenizers need not have the attribute; where it exists, None means that none was set.
        if getattr(self.tokenizer, "chat_template", "") is None:
            raise BadRow(
                field,
                "no chat template",
                f'"{field}" holds chat messages, but the tokenizer has no chat template. Set one with '
                "tokenizer.chat_template = ..., load an instruction-tuned model's tokenizer, or give text columns.",
                structural=True,
            )
        return self.renderer.render(messages, field, generation_prompt=generation_prompt)

    def render_sides(
        self, prompt: list[Message], completions: Mapping[str, list[Message]], prefill: str = ""
    ) -> dict[str, Rendering]:
        """Render each completion together with the prompt.

        Where the template leaves something out, it gets the messages again in other spellings that templates expect.

        Args:
          prompt: at least one message.
          completions: column name -> messages that follow the prompt.
          prefill: text that opens the first answer of every completion and belongs to the prompt.

        Raises:
          BadRow: "template error" where a part of the row is not rendered, or "unstable template" where answers cannot
            be found in the text.
        """
        try:
            return self._render_sides(prompt, completions, prefill)
        except BadRow as bad:
            if bad.structural or bad.reason not in ("template error", "unstable template"):
                raise
            messages = chain(prompt, *completions.values())
            calls = any("tool_calls" in message for message in messages)
            for parts, text in ((False, True), (True, False), (True, True)) if calls else ((True, False),):
                convert = partial(_in_spelling, content_as_parts=parts, arguments_as_text=text)
                other = replace(self, renderer=self.renderer.converting(convert), content_as_parts=parts)
                with suppress(BadRow):
                    return other._render_sides(prompt, completions, prefill)
            raise

    def _render_sides(
        self, prompt: list[Message], completions: Mapping[str, list[Message]], prefill: str
    ) -> dict[str, Rendering]:
        self.renderer.prepare((prompt, True), *((prompt + completion, False) for completion in completions.values()))
        opened = self.render(prompt, "prompt", generation_prompt=True)
        of_prompt = [*self.context]
        for number, message in enumerate(prompt):
            of_prompt += parts_of(message, "prompt", number, scored=False)
        return {
            field: self._render_side(prompt, of_prompt, opened, completion, field, prefill)
            for field, completion in completions.items()
        }

    def _render_side(
        self,
        prompt: list[Message],
        of_prompt: list[Part],
        opened: str,
        completion: list[Message],
        field: str,
        prefill: str,
    ) -> Rendering:
        messages = prompt + completion
        text = self._render_turns(messages, field)
        answers, parts = [], []
        for number, message in enumerate(completion):
            if message["role"] != "assistant":
                parts += parts_of(message, field, number, scored=False)
                continue
            before = messages[: len(prompt) + number]
            opened = opened if number == 0 else self.render(before, field, generation_prompt=True)
            start = self._answer_start(before, opened, text, field, message if len(completion) == 1 else None)
            last = number == len(completion) - 1
            end = len(text) if last else self._turn_end(messages[: len(prompt) + number + 1], text, field)
            of_answer = parts_of(message, field, number, scored=True)
            answers.append(_answer(text, start, end, of_answer))
            parts += of_answer
        refuse_unseen([*of_prompt, *parts], text)
        self._refuse_other_notation(messages, text, field)
        if prefill:
            answers[0] = _behind(prefill, answers[0], text, field)
        return Rendering(text, answers[0].start, tuple(answers))

    def _refuse_other_notation(self, messages: list[Message], text: str, field: str) -> None:
        """Raise `BadRow` where the template prints lists or dicts as Python does: it expects another spelling."""
        if self.content_as_parts and "'type': 'text'" in text.replace('"', "'"):
            raise _in_python(field, "content parts")
        if is_printed_by_python(messages, text):
            raise _in_python(field, "the arguments of a tool call")

    def _answer_start(
        self, before: list[Message], opened: str, text: str, field: str, last_answer: Message | None
    ) -> int:
        """The character of `text` at which the answer to `before` begins.

        Args:
          before: the turns before the answer.
          opened: those turns, rendered for generation.
          text: the whole conversation, rendered.
          field: the column that a fault names.
          last_answer: the answer, where it is the whole completion.

        Raises:
          BadRow: "unstable template".
        """
        if text.startswith(opened):
            return len(opened)
        shared = common_prefix_length(opened, text)
        # A generation prompt may open more than the answer has, such as "<think>": the difference is completion.
        if shared >= common_prefix_length(opened, self.render(before, field)) and shared > 0:
            return shared
        # The template rewrites earlier turns once there is an answer, so find the answer by its words.
        if last_answer is not None:
            start = text.rfind(last_answer["content"].strip())
            if start >= shared and last_answer["content"].strip():
                return start
        raise _unstable(field)

    def _turn_end(self, messages: list[Message], text: str, field: str) -> int:
        """The character of `text` at which the last of `messages` ends."""
        closed = self._render_turns(messages, field)
        for candidate in (closed, closed.rstrip()):
            if text.startswith(candidate):
                return len(candidate)
        raise _unstable(field)

    def _render_turns(self, messages: list[Message], field: str) -> str:
        """Render a conversation without the EOS that some templates add after the stop token of the last turn."""
        text = self.render(messages, field)
        eos_id = self.tokenizer.eos_token_id
        eos = "" if eos_id is None else self.special_tokens.get(eos_id, "")
        turns = text.rstrip().removesuffix(eos)
        ends_twice = text.rstrip().endswith(eos) and turns.rstrip().endswith(tuple(self.special_tokens.values()))
        # Phi-3 writes <|end|> after each turn and EOS after all; a conversation with a next turn has no such EOS.
        if eos and ends_twice and not self._continues(messages, turns + eos, field):
            return turns
        return text

    def _continues(self, messages: list[Message], text: str, field: str) -> bool:
        """True where a conversation that has a next turn begins with `text`."""
        return self.render(messages, field, generation_prompt=True).startswith(text)


def _unstable(field: str) -> BadRow:
    return BadRow(
        field,
        "unstable template",
        f'the chat template renders the earlier turns of "{field}" differently once later turns follow, so the answers '
        "cannot be told apart from the rest. Move the earlier turns into the prompt, or set a tokenizer.chat_template "
        "that renders each turn the same wherever it stands.",
    )


def _in_python(field: str, what: str) -> BadRow:
    return BadRow(
        field,
        "template error",
        f'the chat template writes {what} of "{field}" as Python prints them, not as JSON. Let it write them with '
        "| tojson, or set another tokenizer.chat_template.",
    )


def _in_spelling(message: Message, *, content_as_parts: bool, arguments_as_text: bool) -> Message:
    """A message in the spelling that some templates expect: content as parts, or arguments of calls as JSON text."""
    if arguments_as_text and "tool_calls" in message:
        message = message | {"tool_calls": with_arguments_as_text(message["tool_calls"])}
    return message | {"content": [{"type": "text", "text": message["content"]}]} if content_as_parts else message


def _answer(text: str, start: int, end: int, parts: Sequence[Part]) -> Answer:
    """The answer at characters [start, end), which must contain all its parts.

    Raises:
      BadRow: "template error" where a part is missing.
    """
    for part in parts:
        # The part may begin with text that the generation prompt has written already, such as "<think>".
        refuse_unseen([part], text[max(0, start - len(part.text)) : end])
    words_start = words_end = None
    for part in parts:
        if part.kind == "tool call":
            return Answer(start, end)
        found = text.find(part.text.strip(), words_end or start, end)
        if found < 0:
            return Answer(start, end)
        words_start = found if words_start is None else words_start
        words_end = found + len(part.text.strip())
    return Answer(start, end, None if words_start is None or words_end is None else (words_start, words_end))


def _behind(prefill: str, answer: Answer, text: str, field: str) -> Answer:
    """The answer without the prefill at its beginning.

    Raises:
      BadRow: "unstable template" where the text does not contain the prefill there.
    """
    found = text.find(prefill.lstrip(), max(0, answer.start - len(prefill)), answer.end)
    if found < 0:
        raise BadRow(
            "prompt",
            "unstable template",
            f'"prompt" ends in an assistant message that "{field}" continues, but the chat template rewrites its '
            'text, so the two cannot be told apart. Move that text into both completions, or end "prompt" before it.',
        )
    return answer._replace(start=found + len(prefill.lstrip()))

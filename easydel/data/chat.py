"""Messages to text through a chat template, and which characters of that text the model is to learn."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from .chat_renderer import RowRenderer
from .faults import BadRow
from .messages import Message
from .prompt import common_prefix_length
from .tokenise import Tokenizer


@dataclass(frozen=True, slots=True)
class Rendering:
    """One side of a pair as text.

    Attributes:
      text: prompt and completion together.
      cut: how many characters of it are prompt.
      answers: the [start, end) characters that carry loss, in order; the last one ends the text.
    """

    text: str
    cut: int
    answers: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template for one row.

    Attributes:
      special_tokens: the tokenizer's special ids and how each is written.
    """

    tokenizer: Tokenizer
    special_tokens: Mapping[int, str]
    renderer: RowRenderer

    def render(self, messages: list[Message], field: str, *, generation_prompt: bool = False) -> str:
        """The conversation as text; with `generation_prompt` it ends where the next answer begins.

        Raises:
          BadRow: "template error" with what the template said, "no chat template" when there is none.
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

    def render_pair(
        self, prompt: list[Message], chosen: list[Message], rejected: list[Message]
    ) -> tuple[Rendering, Rendering]:
        """Both completions, each rendered together with the prompt."""
        self.renderer.prepare((prompt, True), (prompt + chosen, False), (prompt + rejected, False))
        opened = self.render(prompt, "prompt", generation_prompt=True)
        sides = (
            self._render_side(prompt, opened, chosen, "chosen"),
            self._render_side(prompt, opened, rejected, "rejected"),
        )
        for number, message in enumerate(prompt):
            if not _is_shown(message, sides[0].text):
                raise BadRow(
                    "prompt",
                    "template error",
                    f'"prompt" message {number} (role {message["role"]}) does not appear in what the chat template '
                    "renders: the template ignores it. Use a role the template knows, or set another "
                    "tokenizer.chat_template.",
                )
        return sides

    def _render_side(self, prompt: list[Message], opened: str, completion: list[Message], field: str) -> Rendering:
        messages = prompt + completion
        text = self._render_turns(messages, field)
        if len(completion) == 1:
            cut = self._answer_start(prompt, opened, text, field, completion[0])
            return Rendering(text, cut, ((cut, len(text)),))
        answers = []
        for number, message in enumerate(completion, start=len(prompt)):
            if message["role"] != "assistant":
                continue
            before = messages[:number]
            opened = opened if number == len(prompt) else self.render(before, field, generation_prompt=True)
            start = self._answer_start(before, opened, text, field, None)
            last = number == len(messages) - 1
            answers.append((start, len(text) if last else self._turn_end(messages[: number + 1], text, field)))
        return Rendering(text, answers[0][0], tuple(answers))

    def _answer_start(
        self, before: list[Message], opened: str, text: str, field: str, last_answer: Message | None
    ) -> int:
        """Where in `text` the answer to `before` begins; `opened` is `before` rendered for generation."""
        if text.startswith(opened):
            return len(opened)
        shared = common_prefix_length(opened, text)
        # A generation prompt may open more than the answer shows, such as "<think>": what differs there is completion.
        if shared >= common_prefix_length(opened, self.render(before, field)) and shared > 0:
            return shared
        # The template rewrites earlier turns once there is an answer. The answer itself is still found by its words.
        if last_answer is not None:
            start = text.rfind(last_answer["content"].strip())
            if start >= shared and last_answer["content"].strip():
                return start
        raise _unstable(field)

    def _turn_end(self, messages: list[Message], text: str, field: str) -> int:
        """Where in `text` the last of `messages` ends."""
        closed = self._render_turns(messages, field)
        for candidate in (closed, closed.rstrip()):
            if text.startswith(candidate):
                return len(candidate)
        raise _unstable(field)

    def _render_turns(self, messages: list[Message], field: str) -> str:
        """The conversation as text, without an EOS that closes the conversation behind its last turn's own stop."""
        text = self.render(messages, field)
        eos_id = self.tokenizer.eos_token_id
        eos = "" if eos_id is None else self.special_tokens.get(eos_id, "")
        turns = text.rstrip().removesuffix(eos)
        ends_twice = text.rstrip().endswith(eos) and turns.rstrip().endswith(tuple(self.special_tokens.values()))
        # Phi-3 writes <|end|> after each turn and EOS after all of them; a going conversation shows which it is.
        if eos and ends_twice and not self._goes_on(messages, turns + eos, field):
            return turns
        return text

    def _goes_on(self, messages: list[Message], text: str, field: str) -> bool:
        return self.render(messages, field, generation_prompt=True).startswith(text)


def _unstable(field: str) -> BadRow:
    return BadRow(
        field,
        "unstable template",
        f'the chat template renders the earlier turns of "{field}" differently once later turns follow, so the answers '
        "cannot be told apart from the rest. Move the earlier turns into the prompt, or set a tokenizer.chat_template "
        "that renders each turn the same wherever it stands.",
    )


def _is_shown(message: Message, text: str) -> bool:
    """Whether a message that templates are known to skip appears in the text, as it is or as JSON."""
    if message["role"] not in ("system", "developer", "tool"):
        return True
    content = message["content"].strip()
    return content in text or json.dumps(content)[1:-1] in text or json.dumps(content, ensure_ascii=False)[1:-1] in text

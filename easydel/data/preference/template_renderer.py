"""Render messages by a tokenizer's chat template, which is untrusted code, in a separate process with a budget."""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from easydel.data.faults import BadRow, describe
from easydel.data.preference.messages import Message
from easydel.data.preference.template_process import TemplateFailure, TemplateProcess, shared_process
from easydel.data.preference.tokenise import Tokenizer
from easydel.errors import visible

# Messages, and whether the text is to end where the next answer begins.
Conversation: TypeAlias = tuple[list[Message], bool]
OF_TRANSFORMERS = ("transformers.tokenization_utils_base", "PreTrainedTokenizerBase.apply_chat_template")
# Arguments of `apply_chat_template` itself, and variables that it gives to every template.
RESERVED = frozenset({
    "conversation", "conversations", "messages", "tools", "add_generation_prompt", "continue_final_message", "tokenize",
    "sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors", "return_dict",
    "return_assistant_tokens_mask", "tokenizer_kwargs",
})  # fmt: skip


@dataclass(frozen=True)
class TemplateRenderer:
    """Render as `transformers` does, in a separate process with a budget; other tokenizers render by their own method.

    Attributes:
      tokenizer: the owner of the template.
      now: the time that `strftime_now` gives to a template.
      process: compiles and renders the template.
    """

    tokenizer: Tokenizer
    now: datetime.datetime
    process: TemplateProcess = field(default_factory=shared_process, compare=False, repr=False)

    def for_row(self, tools: list[Any] | None, kwargs: Mapping[str, Any]) -> RowRenderer:
        """A renderer for the conversations of one row, with its tools and other variables of the template."""
        return RowRenderer(self, tools, kwargs)

    def render(
        self, conversations: Sequence[Conversation], tools: list[Any] | None, kwargs: Mapping[str, Any]
    ) -> list[str | TemplateFailure]:
        """Render conversations of one row to texts; the first failure ends the list."""
        try:
            owner = _owner_of_template(self.tokenizer)
            if owner is not None:
                return self._render_apart(owner, conversations, tools, kwargs)
        except TemplateFailure as failure:
            return [failure]
        # JSON raises ValueError or RecursionError for numbers and depth, transformers any error for functions in tools.
        except Exception as error:
            return [_refused(f"{type(error).__name__}: {error}")]
        return self._render_itself(conversations, tools, kwargs)

    def _render_itself(
        self, conversations: Sequence[Conversation], tools: list[Any] | None, kwargs: Mapping[str, Any]
    ) -> list[str | TemplateFailure]:
        answers: list[str | TemplateFailure] = []
        for messages, generation_prompt in conversations:
            try:
                text = self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=generation_prompt, tools=tools, **kwargs
                )
            except Exception as error:  # somebody else's method may raise anything
                return [*answers, _refused(f"{type(error).__name__}: {error}")]
            if not isinstance(text, str):
                return [*answers, _refused(f"apply_chat_template returned {describe(text)}, expected text")]
            answers.append(text)
        return answers

    def _render_apart(
        self,
        owner: Any,
        conversations: Sequence[Conversation],
        tools: list[Any] | None,
        kwargs: Mapping[str, Any],
    ) -> list[str | TemplateFailure]:
        if reserved := RESERVED & kwargs.keys():
            raise _refused(f"chat_template_kwargs[{min(reserved)!r}] is no variable of a template; leave it out")
        variables = {
            **owner.special_tokens_map,
            **{key: in_json_types(value, f"chat_template_kwargs[{key!r}]") for key, value in kwargs.items()},
            "tools": None if tools is None else [_schema(tool, f"tools[{n}]") for n, tool in enumerate(tools)],
            "documents": in_json_types(kwargs.get("documents"), "documents"),
        }
        template = owner.get_chat_template(variables.pop("chat_template", None), tools)
        if not isinstance(template, str):
            raise TemplateFailure(f"it is {describe(template)}, expected text", is_structural=True)
        # The conversations of a row share most of their messages; each travels once.
        numbers: dict[int, int] = {}
        distinct: list[Any] = []
        for messages, _ in conversations:
            for number, message in enumerate(messages):
                if id(message) not in numbers:
                    numbers[id(message)] = len(distinct)
                    distinct.append(in_json_types(message, f"message {number}", is_lax=True))
        request = {
            "now": self.now.isoformat(),
            "variables": variables,
            "messages": distinct,
            "conversations": [
                ([numbers[id(message)] for message in messages], generation_prompt)
                for messages, generation_prompt in conversations
            ],
        }
        content = json.dumps(request, ensure_ascii=False)
        return self.process.render(template, content[1:-1].encode("utf-8", "surrogatepass"))


class RowRenderer:
    """Render the conversations of one row, each only once.

    Args:
      renderer: renders conversations to texts.
      tools, kwargs: variables that the template gets beside the messages.
      convert: message -> message that the template gets; None changes nothing.
    """

    def __init__(
        self,
        renderer: TemplateRenderer,
        tools: list[Any] | None,
        kwargs: Mapping[str, Any],
        convert: Callable[[Message], Message] | None = None,
    ):
        self._renderer = renderer
        self._tools = tools
        self._kwargs = kwargs
        self._convert = convert
        self._known: dict[tuple[bool, tuple[int, ...]], str | TemplateFailure] = {}
        # Each message and the one that the template gets for it, held so that their ids stay theirs.
        self._given: dict[int, tuple[Message, Message]] = {}

    def converting(self, convert: Callable[[Message], Message]) -> RowRenderer:
        """A renderer of the same row that converts its messages to another spelling."""
        return RowRenderer(self._renderer, self._tools, self._kwargs, convert)

    def prepare(self, *conversations: Conversation) -> None:
        """Render all conversations that will be needed in one request, which costs as much as a rendering."""
        given = [([*map(self._as_given, messages)], generation_prompt) for messages, generation_prompt in conversations]
        texts = self._renderer.render(given, self._tools, self._kwargs)
        for (messages, generation_prompt), text in zip(conversations, texts):
            self._known[generation_prompt, tuple(map(id, messages))] = text

    def render(self, messages: list[Message], column: str, *, generation_prompt: bool = False) -> str:
        """Render a conversation to text; with `generation_prompt` it ends where the next answer begins.

        Args:
          messages: at least one; not changed between two calls.
          column: the column that a fault names.
          generation_prompt: adds the opening of the next answer.

        Raises:
          BadRow: "template error", structural where the template can render no messages.
        """
        key = generation_prompt, tuple(map(id, messages))
        if key not in self._known:
            self.prepare((messages, generation_prompt))
        text = self._known[key]
        if isinstance(text, TemplateFailure):
            raise _fault(messages, column, text) from text
        return text

    def _as_given(self, message: Message) -> Message:
        if id(message) not in self._given:
            self._given[id(message)] = message, message if self._convert is None else self._convert(message)
        return self._given[id(message)][1]


def shows_time(tokenizer: Tokenizer, kwargs: Mapping[str, Any] | None) -> bool:
    """True where a chat template asks for the date."""
    owner = _owner_of_template(tokenizer)
    templates = (owner and owner.chat_template, (kwargs or {}).get("chat_template"))
    return any("strftime_now" in str(template) for template in templates)


def in_json_types(value: Any, where: str, *, is_lax: bool = False) -> Any:
    """Convert a value to JSON types.

    Args:
      value: any value.
      where: its name for the error.
      is_lax: write values of other types as the type's name, which templates never read, rather than refuse them.

    Raises:
      TemplateFailure: JSON cannot hold the value.
    """
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise _refused(f"{where} has the key {describe(key)}, expected text")
        return {key: in_json_types(item, f"{where}[{key!r}]", is_lax=is_lax) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [in_json_types(item, f"{where}[{number}]", is_lax=is_lax) for number, item in enumerate(value)]
    if isinstance(value, np.ndarray) or (isinstance(value, np.generic) and not isinstance(value, np.void)):
        return in_json_types(value.tolist(), where, is_lax=is_lax)
    if is_lax:
        return f"<{type(value).__name__}>"
    raise _refused(f"{where} is {describe(value)}, expected text, numbers, lists and mappings")


def _schema(tool: Any, where: str) -> Any:
    """The JSON schema of a tool, which is a schema already or a function."""
    if isinstance(tool, Mapping):
        return in_json_types(tool, where)
    if callable(tool):
        return _schema_of_function(tool)
    raise _refused(f"{where} is {describe(tool)}, expected a JSON schema or a function")


@functools.cache
def _schema_of_function(function: Callable[..., Any]) -> Any:
    from transformers.utils import get_json_schema  # loaded already, with the tokenizer

    return get_json_schema(function)


def _owner_of_template(tokenizer: Tokenizer) -> Any:
    """The tokenizer, where its method is that of `transformers`; None where an object renders by its own method."""
    method = tokenizer.apply_chat_template
    function = getattr(method, "__func__", None)
    is_theirs = (getattr(function, "__module__", ""), getattr(function, "__qualname__", "")) == OF_TRANSFORMERS
    return method.__self__ if is_theirs else None  # type: ignore[attr-defined]


def _refused(message: str) -> TemplateFailure:
    return TemplateFailure(message, is_structural=False)


def _fault(messages: list[Message], column: str, failure: TemplateFailure) -> BadRow:
    said = visible(" ".join(str(failure).split()))  # on one line
    if failure.is_structural:
        message = f"the chat template cannot be used: {said}. Mend it, or set another tokenizer.chat_template."
    else:
        roles = ", ".join(message["role"] for message in messages)
        message = (
            f'the chat template cannot render "{column}" (roles: {roles}): {said}. Change the messages to what the '
            "template accepts, or set another tokenizer.chat_template."
        )
    return BadRow(column, "template error", message, structural=failure.is_structural)

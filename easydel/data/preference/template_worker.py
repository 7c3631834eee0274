"""Render chat templates in a process of its own, so that a template can harm nothing else.

`TemplateProcess` runs this file as a script. It imports jinja2 and no module of easydel, so that it starts in a tenth
of a second. Requests and replies are bytes after their length; a reply is one or more texts, each after its length and
`Status`.
"""

from __future__ import annotations

import contextlib
import json
import random
import signal
import struct
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import datetime
from enum import IntEnum
from typing import Any, BinaryIO

if __name__ == "__main__":
    sys.path += sys.argv[1:]  # the folders of jinja2: the process starts without site-packages and their hooks

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

# A model's template takes a thousandth of these limits per row. Processor time gives no false alarm on a busy machine.
CPU_SECONDS = 2
# A template that uses no processor time has nothing to wait for; on Windows this is the only limit of time.
WALL_SECONDS = 60
MEMORY_BYTES = 2**29
# Templates of models hold 500 to 30 000 characters.
TEMPLATE_CHARACTERS = 1_000_000
# The trainer's own process tokenises the text, so it may not be much longer than the request.
OUTPUT_CHARACTERS, OUTPUT_FACTOR = 1_000_000, 10
MESSAGE_CHARACTERS = 200

SIZE = struct.Struct(">Q")
HEADER = struct.Struct(">QB")  # size and status of a text


class Status(IntEnum):
    """The content of a reply: a text, a failure on these messages, or the reason why the template always fails."""

    TEXT = 0
    FAILED = 1
    UNUSABLE = 2


class Unusable(Exception):
    """The template exceeds its budget, or is no template."""


class GenerationTag(Extension):
    """The tag `{% generation %} … {% endgeneration %}` around answers, which leaves the text unchanged."""

    tags = {"generation"}  # noqa: RUF012  jinja2's own way

    def parse(self, parser: Parser) -> nodes.Node:
        """The node for the tag and all up to its end, called by jinja2."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_render_body"), [], [], body).set_lineno(line)

    def _render_body(self, caller: Callable[[], str]) -> str:
        return caller()


class PlainDict:
    """`dict` for templates, without the attributes of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """`dict.fromkeys`."""
        return dict.fromkeys(*args)


class PlainNamespace(Namespace):
    """`namespace` for templates, without names that begin with an underscore."""

    # No named parameter: `self` may be the name of an entry.
    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *mappings = args
        entries = dict(*mappings, **kwargs)
        for name in entries:
            _refuse_underscore(name)
        Namespace.__init__(self, entries)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _refuse_underscore(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace takes no names that begin with an underscore: {name!r}")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: Any) -> None:
    raise jinja2.TemplateError(message)


def make_environment(now: Callable[[], datetime]) -> ImmutableSandboxedEnvironment:
    """The environment that `transformers` gives to chat templates; `now` replaces the clock."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: now().strftime(format)
    environment.globals["dict"] = PlainDict()
    environment.globals["namespace"] = PlainNamespace
    return environment


def output_limit(request: bytes) -> int:
    """The most characters that a request may be answered with."""
    return OUTPUT_CHARACTERS + OUTPUT_FACTOR * len(request)


class Renderer:
    """Compile templates, once each, and render requests with them."""

    def __init__(self) -> None:
        self._now = datetime.min
        self._environment = make_environment(lambda: self._now)
        self._templates: list[jinja2.Template] = []

    def texts(self, request: bytes) -> Iterator[str]:
        """Answer a request: with an empty text to a template, with one text per conversation to messages.

        Raises:
          Unusable: the template cannot be compiled, or its text is too long.
        """
        content = json.loads(request.decode("utf-8", "surrogatepass"))
        if "source" in content:
            self._templates.append(self._compile(content["source"]))
            yield ""
            return
        self._now = datetime.fromisoformat(content["now"])
        template, variables = self._templates[content["template"]], content["variables"]
        messages = [_with_names_of_reasoning(message) for message in content["messages"]]
        for numbers, generation_prompt in content["conversations"]:
            random.seed(0)  # else `random` and `lipsum` would give a row another prompt each time
            text = template.render(
                variables, messages=[messages[number] for number in numbers], add_generation_prompt=generation_prompt
            )
            if len(text) > output_limit(request):
                raise Unusable(f"it writes {len(text)} characters, expected at most {output_limit(request)} for these")
            yield text

    def _compile(self, source: str) -> jinja2.Template:
        try:
            return self._environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise Unusable(f"line {error.lineno}: {str(error.message).rstrip('.')}") from error
        # Errors of Python's compiler, of the parser's depth, and of constant expressions, which jinja2 evaluates here.
        except Exception as error:
            if isinstance(error, MemoryError):
                raise
            raise Unusable(_describe(error)) from error


def _with_names_of_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """A message without keys that are None, and with its reasoning under the standard name and under gpt-oss's."""
    message = {key: value for key, value in message.items() if value is not None}
    for name in ("reasoning_content", "thinking", "reasoning"):
        if name in message:
            return {"thinking": message[name], **message, "reasoning_content": message[name]}
    return message


def _describe(error: Exception) -> str:
    """Describe an error, shortened, with the template's line where jinja2 knows it."""
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == "<template>"]
    where = f"line {lines[-1]}: " if lines else ""
    kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
    return f"{where}{kind}{str(error)[:MESSAGE_CHARACTERS].rstrip('.')}"


def reply(renderer: Renderer, request: bytes) -> bytes:
    """Reply to a request, whatever the template does: all texts up to a failure, then the failure."""
    parts = []
    try:
        for text in renderer.texts(request):
            parts.append(_with_header(Status.TEXT, text.encode("utf-8", "surrogatepass")))
    except Unusable as error:
        parts.append(_with_header(Status.UNUSABLE, str(error).encode("utf-8", "backslashreplace")))
    except MemoryError:
        said = f"it needs more than {MEMORY_BYTES >> 20} MiB of memory"
        parts.append(_with_header(Status.UNUSABLE, said.encode()))
    except Exception as error:
        parts.append(_with_header(Status.FAILED, _describe(error).encode("utf-8", "backslashreplace")))
    return b"".join(parts)


def _with_header(status: Status, text: bytes) -> bytes:
    return HEADER.pack(len(text), status) + text


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    """End this process from outside the interpreter when the block takes too long."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    else:
        import faulthandler

        faulthandler.dump_traceback_later(WALL_SECONDS, exit=True, file=2)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()


def limit_resources() -> None:
    """Allow this process `MEMORY_BYTES` of memory, no written files and no core dumps, where the system has limits."""
    try:
        import resource
    except ImportError:
        return
    for name, limit in (("RLIMIT_AS", MEMORY_BYTES), ("RLIMIT_FSIZE", 0), ("RLIMIT_CORE", 0), ("RLIMIT_NOFILE", 16)):
        # A system may not have this limit, or have a lower one already.
        with contextlib.suppress(AttributeError, ValueError, OSError):
            resource.setrlimit(getattr(resource, name), (limit, limit))


def serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """Answer one request after the other until there are no more."""
    renderer = Renderer()
    while len(size := requests.read(SIZE.size)) == SIZE.size:
        with time_limit():
            body = reply(renderer, requests.read(SIZE.unpack(size)[0]))
        replies.write(SIZE.pack(len(body)) + body)
        replies.flush()


def main() -> None:
    """Serve standard input and output; signals to stop are ignored, since the trainer ends this process."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "SIGPROF"):  # even if the trainer's process ignores or blocks it
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGPROF,))
    limit_resources()
    with contextlib.suppress(BrokenPipeError):
        serve(sys.stdin.buffer, sys.stdout.buffer)


if __name__ == "__main__":
    main()

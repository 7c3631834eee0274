"""Read the tools of a row, and the tool calls in its messages, from all their spellings into one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from easydel.data.faults import BadRow, describe
from easydel.data.preference.json_values import is_given, is_list, read_json_text

ToolCall: TypeAlias = dict[str, Any]

# Other names for the arguments of a call; without this list, such a call would seem to have none.
ARGUMENTS_BY_OTHER_NAMES = ("parameters", "args", "kwargs", "input")


def read_tools(tools: Sequence[Any]) -> list[dict[str, Any]]:
    """Read tools as mappings with a name; a tool, its function or its parameters may be JSON text.

    Raises:
      BadRow: "wrong type", "missing value" or "bad value", naming the tool by its number, from 0.
    """
    return [_named_tool(tool, f"tool {number}") for number, tool in enumerate(tools)]


def read_call(call: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Name and arguments of a normalised tool call."""
    function = call.get("function", call)
    return function["name"], function["arguments"]


def read_tool_calls(calls: object, field: str, where: str) -> list[ToolCall]:
    """Read the calls of a message, from a list or its JSON text.

    Args:
      calls: the list or text; None gives no calls.
      field: the column that a fault names.
      where: the message's name in the fault.

    Raises:
      BadRow: "wrong type", "missing value" or "bad value".
    """
    if isinstance(calls, str):
        calls = read_json_text(calls, field, f'"tool_calls" of {where}') if is_given(calls) else []
    if calls is None:
        return []
    if not is_list(calls):
        raise BadRow(field, "wrong type", f'{where} has {describe(calls)} as "tool_calls", expected a list of calls.')
    return [_call(call, field, f"tool call {number} of {where}") for number, call in enumerate(calls)]


def _call(call: object, field: str, where: str) -> ToolCall:
    """A call with its arguments as a mapping, in the shape it came in: with "function" or without."""
    if isinstance(call, str):
        call = read_json_text(call, field, where)
    if not isinstance(call, Mapping):
        raise BadRow(field, "wrong type", f'{where} is {describe(call)}, expected a mapping with "function".')
    function = call.get("function")
    if isinstance(function, str) and function.lstrip().startswith("{"):
        function = read_json_text(function, field, f'"function" of {where}')
    if isinstance(function, Mapping):
        return {"type": "function", **call, "function": _function(function, field, where)}
    return _function(call, field, where)


def _function(function: Mapping[str, Any], field: str, where: str) -> ToolCall:
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str) or not name.strip():
        raise BadRow(
            field, "missing value", f'{where} has {describe(name)} as "name", expected the name of a function.'
        )
    if arguments is None:
        for key in ARGUMENTS_BY_OTHER_NAMES:
            if is_given(function.get(key)):
                raise BadRow(field, "missing value", f'{where} has "{key}" but no "arguments". Rename it.')
    # A function without arguments is called with none, with {} and with "".
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        arguments = {}
    elif isinstance(arguments, str):
        arguments = read_json_text(arguments, field, f'"arguments" of {where}')
    if not isinstance(arguments, Mapping):
        raise BadRow(
            field,
            "wrong type",
            f'{where} has {describe(arguments)} as "arguments", expected a mapping or its JSON text.',
        )
    return {**function, "arguments": arguments}


def calls_in_text(text: str, field: str, where: str) -> list[ToolCall]:
    """The tool calls in ShareGPT's text `{"name": ..., "arguments": ...}` or a list of these; none in other text."""
    if text.lstrip()[:1] not in ("{", "["):
        return []
    value = read_json_text(text, field, where)
    calls = value if isinstance(value, list) else [value]
    if not all(isinstance(call, dict) and {"name", "arguments"} <= call.keys() for call in calls):
        return []
    return [{"type": "function", "function": _function(call, field, where)} for call in calls]


def with_arguments_as_text(calls: Sequence[ToolCall]) -> list[ToolCall]:
    """The calls with their arguments as JSON text, as some templates expect them."""
    written = []
    for call in calls:
        _, arguments = read_call(call)
        own = {"arguments": json.dumps(arguments, ensure_ascii=False)}
        written.append(call | {"function": call["function"] | own} if "function" in call else call | own)
    return written


def _named_tool(tool: Any, where: str) -> dict[str, Any]:
    tool = _tool(tool, where)
    function = tool.get("function", tool)
    if not isinstance(function, Mapping) or not isinstance(function.get("name", tool.get("name")), str):
        raise BadRow("tools", "missing value", f'{where} has no name: {describe(tool)}. Give each tool a "name".')
    return tool


def _tool(tool: Any, where: str) -> dict[str, Any]:
    if isinstance(tool, str):
        tool = read_json_text(tool, "tools", where)
    if not isinstance(tool, Mapping):
        raise BadRow("tools", "wrong type", f"{where} is {describe(tool)}, expected a mapping or its JSON text.")
    tool = dict(tool)
    if isinstance(tool.get("function"), Mapping | str):
        tool["function"] = _tool(tool["function"], f'"function" of {where}')
    if isinstance(tool.get("parameters"), str):
        parameters = read_json_text(tool["parameters"], "tools", f'"parameters" of {where}')
        if not isinstance(parameters, Mapping):
            raise BadRow(
                "tools", "wrong type", f'"parameters" of {where} is {describe(parameters)}, expected a mapping.'
            )
        tool["parameters"] = parameters
    return tool

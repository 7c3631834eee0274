"""Chat messages in any spelling come out in one form; bad ones are covered in test_bad_rows."""

import pytest

from easydel.data.preference.messages import normalise_messages

pytestmark = pytest.mark.usefixtures("one_renderer")


@pytest.mark.parametrize(
    ("speaker", "role"),
    [
        ("human", "user"), ("user", "user"), ("gpt", "assistant"), ("chatgpt", "assistant"), ("bot", "assistant"),
        ("assistant", "assistant"), ("model", "assistant"), ("system", "system"), ("tool", "tool"),
        ("function_response", "tool"), ("observation", "tool"),
    ],
)  # fmt: skip
def test_sharegpt_speakers_become_roles(speaker, role):
    assert normalise_messages([{"from": speaker, "value": "a"}], "prompt") == [{"role": role, "content": "a"}]


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant", "tool"])
def test_openai_roles_stay(role):
    assert normalise_messages([{"role": role, "content": "a"}], "prompt") == [{"role": role, "content": "a"}]


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert normalise_messages([{"role": "user", "content": parts}], "prompt")[0]["content"] == "ab"


def test_an_assistant_that_only_calls_tools_needs_no_content():
    calls = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    message = {"role": "assistant", "content": None, "tool_calls": calls}
    assert normalise_messages([message], "chosen") == [{"role": "assistant", "content": "", "tool_calls": calls}]


def test_a_sharegpt_function_call_becomes_a_tool_call():
    (message,) = normalise_messages(
        [{"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'}], "chosen"
    )
    assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert message["content"] == ""


def test_a_function_call_in_other_words_stays_text():
    assert normalise_messages([{"from": "function_call", "value": "f(1)"}], "chosen") == [
        {"role": "assistant", "content": "f(1)"}
    ]


def test_keys_that_arrow_filled_with_none_are_left_out():
    message = {"role": "user", "content": "a", "name": None, "tool_calls": None, "weight": 0}
    assert normalise_messages([message], "prompt") == [{"role": "user", "content": "a", "weight": 0}]


def test_the_callers_messages_are_left_alone():
    message = {"role": "model", "content": "a", "name": None}
    normalise_messages([message], "chosen")
    assert message == {"role": "model", "content": "a", "name": None}

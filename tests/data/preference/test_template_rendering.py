"""Chat templates rendered in a process apart give what `transformers` gives."""

from __future__ import annotations

import datetime

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from easydel.data.faults import BadRow
from easydel.data.preference.template_renderer import TemplateRenderer, shows_time

NOW = datetime.datetime(2025, 3, 1, 12, 30)

CHATML = """{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' + message.content | trim + '<|im_end|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""

LLAMA31 = """{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\nToday Date: " + date_string + "\n\n" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\n\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}
        {{- "}<|eot_id|>" }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim }}
        {{- '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"""

QWEN3 = """{%- if tools %}
{{- '<|im_start|>system\n# Tools\n<tools>' }}
{%- for tool in tools %}{{- "\n" }}{{- tool | tojson }}{%- endfor %}
{{- "\n</tools><|im_end|>\n" }}
{%- endif %}
{%- set ns = namespace(last_query=messages | length - 1, seeking=true) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if ns.seeking and message.role == "user" and not message.content.startswith('<tool_response>') %}
        {%- set ns.seeking = false %}
        {%- set ns.last_query = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {%- set reasoning = message.reasoning_content if message.reasoning_content is string else '' %}
        {%- set content = message.content %}
        {%- if not reasoning and '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.index0 > ns.last_query and (loop.last or reasoning) %}
            {{- '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' }}
        {%- endif %}
        {{- content }}
        {%- for call in message.tool_calls or [] %}
            {{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
            {%- if call.function.arguments is string %}{{- call.function.arguments }}
            {%- else %}{{- call.function.arguments | tojson }}{%- endif %}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}"""

MISTRAL = """{%- if messages[0]["role"] == "system" %}{%- set system = messages[0]["content"] %}
{%- set rest = messages[1:] %}{%- else %}{%- set rest = messages %}{%- endif %}
{{- bos_token }}
{%- for message in rest %}
    {%- if message.role == "user" %}
        {%- if loop.last and system is defined %}{{- "[INST] " + system + "\n\n" + message.content + "[/INST]" }}
        {%- else %}{{- "[INST] " + message.content + "[/INST]" }}{%- endif %}
    {%- elif message.role == "assistant" %}{{- " " + message.content | trim + eos_token }}
    {%- else %}{{- raise_exception("Only user and assistant roles are supported!") }}
    {%- endif %}
{%- endfor %}"""

GEMMA = """{{ bos_token }}
{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}
{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}
{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}
{% endfor %}
{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"""

PHI3 = """{% for message in messages %}{% if message['role'] == 'system' %}{% continue %}{% endif %}
    {% generation %}
    {{'<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n'}}
    {% endgeneration %}
{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"""

# Everything that the environment of `transformers` has and jinja2's has not, or has otherwise.
CORNERS = """  {% if true %}
    {{ messages | tojson }} {{ messages | tojson(ensure_ascii=true, sort_keys=true) }}
    {{ {'<b>': '&é'} | tojson(separators=(',', ':')) }} {{ (messages[0]) | tojson(indent=2) }}
  {% endif %}
{% set ns = namespace({'n': 0}, self=1) %}{% for i in range(9) %}{% if i == 5 %}{% break %}{% endif %}
{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }} {{ ns.self }} {{ dict(a=1, **{'b': 2}) }} {{ dict.fromkeys('ab', 3) }}
{{ dict([('x', 1)]) }} {% macro twice(text) -%} {{ text }}{{ caller() }} {%- endmacro %}
{% call twice('a') %}b{% endcall %} {{ strftime_now('%d %b %Y') }}
{{ documents }} {{ tools }} {{ add_generation_prompt }}
{{ bos_token }} {{ eos_token }} {{ pad_token }} {{ unk_token is defined }} {{ none_given is none }} {{ number * 2 }}
{{ messages[0].thinking is defined }} {{ messages[-1].reasoning_content }} {{ messages[-1].thinking }}
{{ '<a>' | escape }} {{ '%s' | format('<') }} {{ missing }} {{ missing is defined }}
{{ '\u00fc'.encode() is string }}"""

TEMPLATES = {
    "chatml": CHATML,
    "llama31": LLAMA31,
    "qwen3": QWEN3,
    "mistral": MISTRAL,
    "gemma": GEMMA,
    "phi3": PHI3,
    "corners": CORNERS,
}

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a <place> & more, 天気",
        "parameters": {"type": "object", "properties": {"where": {"type": "string"}}, "required": ["where"]},
    },
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"where": "Zürich", "days": [1, 2.5, None]}}}


def say(role, content, **more):
    return {"role": role, "content": content, **more}


CONVERSATIONS = {
    "one turn": [say("user", " Grüße, 世界 🎈\n\n<b>&amp;</b> {{ 7 * 7 }} 'quoted' \"twice\" \\ \x85\u2028 end ")],
    "answered": [say("user", "Hi"), say("assistant", "<think>\nhm\n</think>\n\nHello.\n"), say("user", "And?\t")],
    "system": [say("system", "Be kind."), say("user", "Hi"), say("assistant", " Hello ")],
    "tool call": [
        say("user", "Weather?"),
        say("assistant", "", tool_calls=[CALL]),
        say("tool", '{"sun": true}', name=None),
        say("assistant", "It is sunny."),
    ],
    "reasoning": [say("user", "2 + 2?"), say("assistant", "4", reasoning="easy")],
}


def special_tokens(template: object) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE()), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.chat_template = template
    return tokenizer


def render(tokenizer, messages, *, generation_prompt=False, tools=None, now=NOW, **kwargs) -> str:
    renderer = TemplateRenderer(tokenizer, now).for_row(tools, kwargs)
    return renderer.render(messages, "prompt", generation_prompt=generation_prompt)


def of_transformers(tokenizer, messages, *, generation_prompt, tools, **kwargs) -> str:
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=generation_prompt, tools=tools, **kwargs
    )


KWARGS = {
    "none": {},
    "thinking": {"enable_thinking": False, "number": 21, "none_given": None, "date_string": "1 Jan 2020"},
    "documents": {"documents": [{"title": "a", "text": "<é>"}], "number": 2, "bos_token": "<mine>"},
}


@pytest.mark.parametrize("kwargs", KWARGS)
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_gives_the_text_that_transformers_gives(template, conversation, kwargs):
    tokenizer = special_tokens(TEMPLATES[template])
    messages = CONVERSATIONS[conversation]
    for generation_prompt in (False, True):
        for tools in (None, [TOOL]):
            options = {"generation_prompt": generation_prompt, "tools": tools, **KWARGS[kwargs]}
            try:
                expected = of_transformers(tokenizer, messages, **options)
            except Exception as error:
                with pytest.raises(BadRow) as caught:
                    render(tokenizer, messages, **options)
                assert str(error).rstrip(".") in caught.value.message
                assert not caught.value.structural
            else:
                assert render(tokenizer, messages, now=datetime.datetime.now(), **options) == expected


def test_one_of_several_templates_is_chosen_as_transformers_chooses():
    tokenizer = special_tokens({"default": "default {{ messages[0].content }}", "tool_use": "tools {{ tools }}"})
    messages = CONVERSATIONS["one turn"]
    for tools, kwargs in (
        (None, {}),
        ([TOOL], {}),
        (None, {"chat_template": "tool_use"}),
        (None, {"chat_template": "x"}),
    ):
        expected = of_transformers(tokenizer, messages, generation_prompt=False, tools=tools, **kwargs)
        assert render(tokenizer, messages, tools=tools, **kwargs) == expected
    tokenizer.chat_template = {"rag": "x"}
    with pytest.raises(BadRow, match="multiple chat templates"):
        render(tokenizer, messages)


def test_the_time_is_the_one_given_not_the_clocks():
    tokenizer = special_tokens("{{ strftime_now('%Y-%m-%d %H:%M') }}")
    assert render(tokenizer, [say("user", "x")]) == "2025-03-01 12:30"
    assert render(tokenizer, [say("user", "x")], now=datetime.datetime(1999, 12, 31)) == "1999-12-31 00:00"


def test_templates_that_ask_for_the_time_are_told_from_others():
    assert shows_time(special_tokens(LLAMA31), None)
    assert shows_time(special_tokens({"default": CHATML, "tool_use": LLAMA31}), None)
    assert shows_time(special_tokens(CHATML), {"chat_template": LLAMA31})
    assert not shows_time(special_tokens(CHATML), {"date_string": "today"})
    assert not shows_time(special_tokens(None), None)


def test_functions_are_tools_as_in_transformers():
    def weather(where: str) -> str:
        """The weather.

        Args:
            where: a town.
        """

    tokenizer = special_tokens("{{ tools | tojson }}")
    messages = CONVERSATIONS["one turn"]
    expected = of_transformers(tokenizer, messages, generation_prompt=False, tools=[weather])
    assert render(tokenizer, messages, tools=[weather]) == expected


@pytest.mark.parametrize(
    ("tools", "kwargs", "named"),
    [
        (None, {"since": datetime.date(2020, 1, 1)}, "chat_template_kwargs['since']"),
        (None, {"deep": {"list": [1, {2, 3}]}}, "chat_template_kwargs['deep']['list'][1]"),
        (None, {"ids": {1: "a"}}, "chat_template_kwargs['ids'] has the key int 1"),
        (None, {"image": b"\x89PNG"}, "chat_template_kwargs['image']"),
        (None, {"huge": 10**5000}, "Exceeds the limit"),
        (["weather"], {}, "tools[0] is str 'weather'"),
        ([TOOL, {"function": object()}], {}, "tools[1]['function']"),
        (None, {"tokenize": True}, "chat_template_kwargs['tokenize']"),
        (None, {"continue_final_message": True}, "chat_template_kwargs['continue_final_message']"),
    ],
)
def test_values_that_no_template_can_be_given_are_named(tools, kwargs, named):
    with pytest.raises(BadRow) as caught:
        render(special_tokens(CHATML), CONVERSATIONS["one turn"], tools=tools, **kwargs)
    assert caught.value.reason == "template error" and named in caught.value.message


def test_values_nested_too_deeply_are_a_fault():
    deep: list = []
    for _ in range(10_000):
        deep = [deep]
    with pytest.raises(BadRow, match="RecursionError"):
        render(special_tokens(CHATML), CONVERSATIONS["one turn"], deep=deep)


def test_numbers_and_lists_of_numpy_are_what_they_hold():
    tokenizer = special_tokens("{{ flag is true }} {{ numbers }} {{ count + 1 }}")
    kwargs = {"flag": np.bool_(True), "numbers": np.arange(3), "count": np.int64(4)}
    assert render(tokenizer, [say("user", "x")], **kwargs) == "True [0, 1, 2] 5"


def test_half_a_surrogate_pair_comes_back_as_it_was():
    text = "a\ud83d b\ude00 \ud83d\ude00"
    assert render(special_tokens("{{ messages[0].content }}"), [say("user", text)]) == text


def test_a_template_that_draws_at_random_draws_the_same_for_every_row():
    tokenizer = special_tokens("{{ range(1000) | random }} {{ lipsum(n=1) }}")
    assert len({render(tokenizer, [say("user", "x")]) for _ in range(3)}) == 1


def test_what_a_message_holds_besides_never_reaches_the_template_as_an_object():
    message = say("user", "x", when=datetime.datetime(2020, 1, 1), image=b"PNG")
    tokenizer = special_tokens("{{ messages[0].when }} {{ messages[0].image }}")
    assert render(tokenizer, [message]) == "<datetime> <bytes>"
    assert of_transformers(tokenizer, [message], generation_prompt=False, tools=None) == "<datetime> <bytes>"


def test_conversations_of_a_row_rendered_at_once_are_those_rendered_alone():
    messages = CONVERSATIONS["tool call"]
    wanted = [(messages[:1], True), (messages, False), (messages, True), (messages[:3], False)]
    for template in (CHATML, LLAMA31):
        tokenizer = special_tokens(template)
        at_once = TemplateRenderer(tokenizer, NOW).for_row([TOOL], {})
        at_once.prepare(*wanted)
        tokenizer.chat_template = None  # nothing is rendered any more
        texts = [at_once.render(some, "prompt", generation_prompt=prompt) for some, prompt in wanted]
        tokenizer.chat_template = template
        assert texts == [render(tokenizer, some, generation_prompt=prompt, tools=[TOOL]) for some, prompt in wanted]


def test_the_first_failure_among_several_is_told_of_its_own_conversation():
    template = "{% if messages | length > 1 %}{{ raise_exception('too long') }}{% endif %}short"
    messages = CONVERSATIONS["answered"]
    row = TemplateRenderer(special_tokens(template), NOW).for_row(None, {})
    row.prepare((messages[:1], True), (messages, False), (messages[:1], False))
    assert row.render(messages[:1], "prompt", generation_prompt=True) == "short"
    with pytest.raises(BadRow, match="too long") as caught:
        row.render(messages, "chosen")
    assert caught.value.field == "chosen"
    assert row.render(messages[:1], "prompt") == "short"

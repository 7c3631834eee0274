"""What a row says is what is trained on: each part is used, or the row is refused with a reason."""

import io
import json

import numpy as np
import pytest
from rich.console import Console
from transformers import AddedToken

from easydel.data.faults import RowFault, describe
from easydel.data.preference.columns import unread_columns
from easydel.data.preference.show import render_fault, render_pair
from easydel.data.preference.transform import PreferenceTransform
from easydel.data.tree import PreferencePair
from easydel.errors import visible

pytestmark = pytest.mark.usefixtures("one_renderer")

QUESTION = "What is the capital of France, and why?"
LISTED = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def user(text, **others):
    return {"role": "user", "content": text, **others}


def assistant(text, **others):
    return {"role": "assistant", "content": text, **others}


def system(text):
    return {"role": "system", "content": text}


def call(arguments, text="", name="weather"):
    return assistant(text, tool_calls=[{"type": "function", "function": {"name": name, "arguments": arguments}}])


CHAT = {"prompt": [user(QUESTION)], "chosen": [assistant("It is Paris.")], "rejected": [assistant("The sea.")]}
WHOLE = {"chosen": [user(QUESTION), assistant("It is Paris.")], "rejected": [user(QUESTION), assistant("The sea.")]}

TOOLS = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n'"
    " + m.content }}{% for c in m.tool_calls or [] %}{{ '<call>' + c.function.name + ' ' }}"
    "{{ c.function.arguments | tojson }}{{ '</call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + CONTENT + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THINKS = CHATML.replace(
    "CONTENT", "('<think>' + m.reasoning_content + '</think>' if m.reasoning_content else '') + m.content"
)
DROPS_THINKING = CHATML.replace("CONTENT", "m.content.split('</think>')[-1]")
DROPS_TEXT_BESIDE_CALLS = TOOLS.replace("+ m.content }}", "+ ('' if m.tool_calls else m.content) }}")
PRINTS_ARGUMENTS = TOOLS.replace("c.function.arguments | tojson", "c.function.arguments")
JOINS_ARGUMENTS = TOOLS.replace("c.function.arguments | tojson", "'' + c.function.arguments")
INDENTS = TOOLS.replace("c.function.arguments | tojson", "c.function.arguments | tojson(indent=4)")
TRIMS, QUOTES, ESCAPES = (
    CHATML.replace("CONTENT", f"(m.content{how})") for how in (" | trim", " | tojson", ".replace('<', '&lt;')")
)
ITERATES_PARTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% for p in m.content %}{% if p.type == 'text' %}"
    "{{ p.text }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DOCUMENTS = "{% for d in documents or [] %}{{ '[' + d.title + '] ' + d.text + '\n' }}{% endfor %}" + TOOLS


def transformed(tokenizer, row, template=None):
    kwargs = None if template is None else {"chat_template": template}
    transform = PreferenceTransform(tokenizer, max_length=None, max_prompt_length=None, chat_template_kwargs=kwargs)
    return transform(row)


def texts(tokenizer, row, template=None):
    pair = transformed(tokenizer, row, template)
    assert isinstance(pair, PreferencePair), pair
    return tuple(tokenizer.decode(ids) for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids))


def refusal(tokenizer, row, template=None):
    fault = transformed(tokenizer, row, template)
    assert isinstance(fault, RowFault), fault
    assert len(fault.message) < 700
    return fault


# Turns are compared by what they say


@pytest.mark.parametrize(
    "row",
    [
        WHOLE | {"prompt": QUESTION + "\n"},
        WHOLE | {"prompt": [user(" " + QUESTION, id=3, name="Bob", timestamp="now")]},
        WHOLE | {"prompt": ""},
        WHOLE | {"prompt": None},
        WHOLE | {"prompt": [user(" ")]},
        WHOLE | {"prompt": [{"from": "human", "value": QUESTION}]},
        WHOLE | {"prompt": QUESTION, "rejected": [{"from": "human", "value": QUESTION + " "}, assistant("The sea.")]},
        WHOLE | {"prompt": QUESTION, "rejected": [assistant("The sea.")]},
        WHOLE | {"prompt": QUESTION, "chosen": [user(QUESTION, id=1), assistant("It is Paris.")]},
        {"chosen": WHOLE["chosen"], "rejected": [user(QUESTION + "\n", id=2), assistant("The sea.")]},
        {field: json.dumps(messages) for field, messages in CHAT.items()},
        {field: json.dumps(messages) for field, messages in WHOLE.items()} | {"prompt": QUESTION},
        CHAT | {"prompt": json.dumps(CHAT["prompt"])},
    ],
)
def test_a_conversation_in_any_spelling_holds_its_question_once(chatml, row):
    assert texts(chatml, row) == texts(chatml, CHAT)


@pytest.mark.parametrize(
    "row",
    [
        WHOLE | {"prompt": [system("Be kind."), user(QUESTION)]},
        {"prompt": QUESTION} | {field: [system("Be kind."), *turns] for field, turns in WHOLE.items()},
        CHAT | {"system": "Be kind."},
        CHAT | {"system_prompt": "Be kind.", "system": None},
        WHOLE | {"system_message": "Be kind."},
        CHAT | {"system": "Be kind. ", "prompt": [system("Be kind."), user(QUESTION)]},
    ],
)
def test_a_system_message_comes_once_wherever_it_is_given(chatml, row):
    prompt = texts(chatml, row)[0]
    assert prompt.count("Be kind.") == 1 and prompt.count(QUESTION) == 1
    assert texts(chatml, row) == texts(chatml, CHAT | {"prompt": [system("Be kind."), user(QUESTION)]})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (WHOLE | {"prompt": "Another question, what is it?"}, "no shared prompt"),
        (WHOLE | {"prompt": QUESTION, "chosen": [system("Be kind."), *WHOLE["chosen"]]}, "no shared prompt"),
        (
            {"prompt": [system("Be rude."), user(QUESTION)]}
            | {field: [system("Be kind."), *turns] for field, turns in WHOLE.items()},
            "no shared prompt",
        ),
        (CHAT | {"system": "Be kind.", "prompt": [system("Be rude."), user(QUESTION)]}, "bad value"),
        (CHAT | {"system": "Be kind.", "system_prompt": "Be rude."}, "bad value"),
        (CHAT | {"system": 3}, "wrong type"),
        (CHAT | {"rejected": [assistant("It is Paris.\n", id=7)]}, "chosen equals rejected"),
        (WHOLE | {"prompt": QUESTION, "rejected": [assistant(" It is Paris.")]}, "chosen equals rejected"),
        ({"prompt": "a b", "chosen": " c", "rejected": " c\n"}, "chosen equals rejected"),
    ],
)
def test_turns_that_contradict_each_other_are_refused(chatml, row, reason):
    assert refusal(chatml, row).reason == reason


# Structure stored as text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (str(CHAT["prompt"]), "Python"),
        (json.dumps(CHAT["prompt"])[:-4], "not valid JSON"),
        (json.dumps(json.dumps(CHAT["prompt"])), "JSON inside JSON"),
        (json.dumps(CHAT["prompt"][0]), "not a list"),
        (json.dumps([{"role": "narrator", "content": "x"}]), "narrator"),
        (json.dumps([{"role": "user"}]), "content"),
    ],
)
@pytest.mark.parametrize("field", ["prompt", "chosen", "rejected"])
def test_text_that_looks_like_messages_and_is_not_is_refused(chatml, field, text, words):
    row = {name: json.dumps(messages) for name, messages in CHAT.items()} | {field: text}
    fault = refusal(chatml, row)
    assert fault.field == field and words in fault.message


@pytest.mark.parametrize(
    "text",
    ["[1] One.", "[INST] a [/INST]", "[]", '[{"name": "Bob", "role": "admin"}]', '[{"from": "Oslo", "to": "Rome"}]',
     "[{'a': 1}]", '{"role": "the hero"}', "[" * 5000, '"quoted" words'],
)  # fmt: skip
def test_an_answer_that_only_begins_like_a_list_stays_text(mistral, text):
    assert texts(mistral, {"prompt": "Say it: ", "chosen": text, "rejected": "no"})[1].endswith(text + "</s>")


def test_one_completion_as_json_text_beside_plain_text_is_refused(chatml):
    assert refusal(chatml, {"prompt": "Write JSON.", "chosen": json.dumps([assistant("x")]), "rejected": "y"})


def test_token_ids_as_json_text_are_token_ids(mistral):
    row = {"prompt_ids": "[10, 11]", "chosen_ids": "[12]", "rejected_ids": "[13]"}
    assert transformed(mistral, row).chosen_ids.tolist() == [12]
    assert refusal(mistral, row | {"chosen_ids": "12"}).reason == "wrong type"


ARGUMENTS = {"city": "Oslo", "days": 3}


@pytest.mark.parametrize(
    "message",
    [
        call(ARGUMENTS),
        call(json.dumps(ARGUMENTS)),
        call(ARGUMENTS | {"country": None}),
        assistant("", tool_calls=json.dumps(call(ARGUMENTS)["tool_calls"])),
        assistant(None, tool_calls=[json.dumps(call(json.dumps(ARGUMENTS))["tool_calls"][0])]),
        assistant(None, function_call={"name": "weather", "arguments": json.dumps(ARGUMENTS)}),
        {"from": "function_call", "value": json.dumps({"name": "weather", "arguments": json.dumps(ARGUMENTS)})},
    ],
)
def test_a_tool_call_in_any_spelling_gives_its_arguments_once(chatml, message):
    chosen = texts(chatml, CHAT | {"chosen": [message]}, TOOLS)[1]
    assert chosen == '<call>weather {"city": "Oslo", "days": 3}</call><|im_end|>'


@pytest.mark.parametrize("arguments", ['{"city": ', "Oslo", "[1]", '"{}"', [1], 3])
def test_arguments_that_are_no_mapping_are_refused(chatml, arguments):
    assert "arguments" in refusal(chatml, CHAT | {"chosen": [call(arguments)]}, TOOLS).message


def test_a_call_whose_arguments_go_by_another_name_is_refused(chatml):
    odd = assistant("", tool_calls=[{"name": "weather", "parameters": {"city": "Oslo"}}])
    assert '"parameters"' in refusal(chatml, CHAT | {"chosen": [odd]}, TOOLS).message


def test_nulls_that_arrow_filled_in_are_removed_and_those_of_json_text_stay(chatml):
    filled = {
        "type": "function",
        "function": {"name": "weather", "parameters": {"city": {"enum": ["a", None]}, "no": None}},
    }
    assert '"no"' not in texts(chatml, CHAT | {"tools": [filled]}, TOOLS)[0]
    assert '"enum": ["a", null]' in texts(chatml, CHAT | {"tools": [filled]}, TOOLS)[0]
    assert '"no": null' in texts(chatml, CHAT | {"tools": json.dumps([filled])}, TOOLS)[0]
    own = json.dumps([call(json.dumps({"city": None}))])
    row = CHAT | {"chosen": own, "rejected": CHAT["rejected"]}
    assert '{"city": null}' in texts(chatml, row, TOOLS)[1]


def test_parameters_of_a_tool_as_json_text_are_a_mapping(chatml):
    tool = {"type": "function", "function": {"name": "weather", "parameters": '{"type": "object"}'}}
    for tools in ([tool], [json.dumps(tool)], json.dumps([tool])):
        assert '"parameters": {"type": "object"}' in texts(chatml, CHAT | {"tools": tools}, TOOLS)[0]


# Columns that mean something


@pytest.mark.parametrize(
    ("columns", "field"),
    [
        ({"images": ["a.png"]}, "images"),
        ({"image": np.zeros((2, 2))}, "image"),
        ({"audio": {"path": "a.wav"}}, "audio"),
        ({"documents": [{"title": "t", "text": "Paris is a city."}]}, "documents"),
        ({"tools": [LISTED]}, "tools"),
        ({"history": [["hi"]]}, "history"),
        ({"history": [["hi", "hello"]], "prompt": [user("a"), assistant("b"), user("c")]}, "history"),
    ],
)
def test_columns_that_would_be_lost_are_refused(chatml, columns, field):
    assert refusal(chatml, CHAT | columns).field == field


@pytest.mark.parametrize(
    ("column", "value", "name"),
    [
        ("functions", [LISTED], "tools"),
        ("chat_history", [["hi", "hello"]], "history"),
        ("system_instruction", "Answer in French.", "system"),
        ("System", "Answer in French.", "system"),
    ],
)
def test_a_column_of_context_under_another_name_is_refused_with_its_own(chatml, column, value, name):
    fault = refusal(chatml, CHAT | {column: value})
    assert (fault.field, fault.reason) == (column, "unused column")
    assert f'rename_fields({{"{column}": "{name}"}})' in fault.message
    assert texts(chatml, CHAT | {column: None}) == texts(chatml, CHAT)


@pytest.mark.parametrize("column", ["images", "system", "history", "documents", "tools", "chat_template_kwargs"])
def test_the_nan_that_pandas_writes_for_an_absent_value_says_nothing(chatml, column):
    assert texts(chatml, CHAT | {column: float("nan")}) == texts(chatml, CHAT)
    assert texts(chatml, CHAT | {column: np.float64("nan")}) == texts(chatml, CHAT)


@pytest.mark.parametrize("value", [None, "", [], {}, "[]", [None], {"bytes": None}])
@pytest.mark.parametrize("column", ["images", "video", "system", "history", "documents", "tools"])
def test_columns_that_are_empty_say_nothing(chatml, column, value):
    if column in ("system", "documents", "tools", "history") and isinstance(value, dict) and value:
        pytest.skip("a mapping is no value of this column")
    if column == "tools" and value in ("[]", [None], {}):
        pytest.skip("a list of no tool, or no list")
    assert texts(chatml, CHAT | {column: value}) == texts(chatml, CHAT)


@pytest.mark.parametrize("history", [[["hi", "hello"]], '[["hi", "hello"]]', [user("hi"), assistant("hello")]])
def test_history_stands_before_the_prompt_once(chatml, history):
    turns = [user("hi"), assistant("hello"), user(QUESTION)]
    expected = texts(chatml, CHAT | {"prompt": turns})
    assert texts(chatml, CHAT | {"history": history}) == expected
    assert texts(chatml, CHAT | {"history": history, "prompt": turns}) == expected


def test_documents_reach_a_template_that_writes_them(chatml):
    row = CHAT | {"documents": [{"title": "Cities", "text": "Paris is a city."}]}
    assert texts(chatml, row, DOCUMENTS)[0].startswith("[Cities] Paris is a city.\n")


@pytest.mark.parametrize("column", ["system", "history", "documents", "tools", "chat_template_kwargs"])
def test_plain_text_uses_no_template_so_what_needs_one_is_refused(mistral, column):
    values = {"system": "Be kind.", "chat_template_kwargs": {"a": 1}, "tools": [LISTED]}
    row = {"prompt": "a b", "chosen": " c", "rejected": " d", column: values.get(column, [["hi", "hello"]])}
    fault = refusal(mistral, row)
    assert (fault.field, fault.reason) == (column, "unused column")


def test_a_system_prompt_that_the_text_holds_already_is_in_its_place(mistral):
    row = {"system": "Be kind.", "prompt": "Be kind. Hello", "chosen": " c", "rejected": " d"}
    assert texts(mistral, row)[0] == "<s>Be kind. Hello"


def test_columns_that_nothing_reads_are_named():
    rows = [CHAT | {"score": 3, "weight": 1.0}, CHAT | {"id": 7, "score": 4, "images": None}, 3]
    assert unread_columns(rows) == ["score", "id"]
    assert unread_columns([{"prompt_ids": [1], "chosen": "a", "rejected": "b"}]) == ["prompt_ids"]


def test_a_margin_is_read_only_where_an_objective_needs_it(chatml):
    rows = [CHAT | {"margin": "large"}, CHAT | {"margin": 0.5}]
    assert [PreferenceTransform(chatml)(row).margin for row in rows] == [None, None]
    assert unread_columns(rows) == ["margin"] and unread_columns(rows, reads_margin=True) == []
    assert PreferenceTransform(chatml, reads_margin=True)(rows[1]).margin == 0.5


@pytest.mark.parametrize(
    ("margin", "reason"),
    [
        ({}, "missing column"),
        ({"margin": None}, "missing value"),
        ({"margin": "large"}, "wrong type"),
        ({"margin": float("nan")}, "bad value"),
        ({"margin": float("inf")}, "bad value"),
    ],
)
def test_a_margin_that_an_objective_needs_is_a_finite_number(chatml, margin, reason):
    fault = PreferenceTransform(chatml, reads_margin=True)(CHAT | margin)
    assert (fault.field, fault.reason, fault.structural) == ("margin", reason, reason == "missing column")


# What a template leaves out

THOUGHT = CHAT | {"chosen": [assistant("Paris.", reasoning_content="It has the tower.")]}
THOUGHT_IN_TEXT = CHAT | {"chosen": [assistant("<think>\nIt has the tower.\n</think>\n\nParis.")]}


@pytest.mark.parametrize(
    ("template", "row", "field", "words"),
    [
        (None, THOUGHT, "chosen", "reasoning_content"),
        (None, CHAT | {"rejected": [assistant("Sea.", thinking="Water.")]}, "rejected", "thinking"),
        (DROPS_THINKING, THOUGHT_IN_TEXT, "chosen", "reasoning"),
        (None, CHAT | {"chosen": [call({}, "Let me see.")]}, "chosen", "weather"),
        (DROPS_TEXT_BESIDE_CALLS, CHAT | {"chosen": [call({}, "Let me see.")]}, "chosen", "text"),
        (None, CHAT | {"prompt": [user("What is the weather?")], "tools": [LISTED]}, "tools", '"weather"'),
        (ITERATES_PARTS.replace("p.text", "'x'"), CHAT, "chosen", "text"),
        (CHATML.replace("CONTENT", "('Hm.' if m.role == 'assistant' else m.content)"), CHAT, "chosen", "text"),
        (CHATML.replace("CONTENT", "('Hm.' if m.role == 'user' else m.content)"), CHAT, "prompt", "text"),
    ],
)  # fmt: skip
def test_a_part_that_the_template_leaves_out_is_named(chatml, template, row, field, words):
    fault = refusal(chatml, row, template)
    assert (fault.field, fault.reason) == (field, "template error") and words in fault.message


@pytest.mark.parametrize(
    ("template", "row", "chosen"),
    [
        (THINKS, THOUGHT, "<think>It has the tower.</think>Paris.<|im_end|>"),
        (None, THOUGHT_IN_TEXT, "<think>\nIt has the tower.\n</think>\n\nParis.<|im_end|>"),
        (TOOLS, CHAT | {"chosen": [call({"é": '"\n'}, "Oh")]}, 'Oh<call>weather {"é": "\\"\\n"}</call><|im_end|>'),
        (INDENTS, CHAT | {"chosen": [call({"a": 1})]}, '<call>weather {\n    "a": 1\n}</call><|im_end|>'),
        (PRINTS_ARGUMENTS, CHAT | {"chosen": [call({"a": "b"})]}, '<call>weather {"a": "b"}</call><|im_end|>'),
        (JOINS_ARGUMENTS, CHAT | {"chosen": [call({"a": "b"})]}, '<call>weather {"a": "b"}</call><|im_end|>'),
        (ITERATES_PARTS, CHAT, "It is Paris.<|im_end|>"),
        (TRIMS, CHAT | {"chosen": [assistant(" It is.\n")]}, "It is.<|im_end|>"),
        (QUOTES, CHAT | {"chosen": [assistant('"é"\n')]}, '"\\"é\\"\\n"<|im_end|>'),
        (ESCAPES, CHAT | {"chosen": [assistant("a < b")]}, "a &lt; b<|im_end|>"),
    ],
)  # fmt: skip
def test_a_template_may_write_a_part_in_its_own_way(chatml, template, row, chosen):
    assert texts(chatml, row, template)[1] == chosen


def test_the_reasoning_of_an_earlier_turn_may_be_dropped(chatml):
    row = CHAT | {"prompt": [user("hi"), assistant("<think>hm</think>hello", reasoning="why"), user(QUESTION)]}
    assert "hello" in texts(chatml, row, DROPS_THINKING)[0]


# Stop tokens

TURN_END = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>\n' }}{% if AFTER %}"
    "{{ '<|im_end|>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@pytest.mark.parametrize("after", ["false", "m.role == 'assistant'"])
def test_an_added_special_token_that_the_tokenizer_does_not_list_ends_an_answer(chatml, after):
    tokenizer = type(chatml)(tokenizer_object=chatml.backend_tokenizer, eos_token="<|im_end|>", chat_template="")
    tokenizer.add_tokens([AddedToken(token, special=True) for token in ("<|end|>", "<|user|>", "<|assistant|>")])
    assert "<|end|>" not in tokenizer.all_special_tokens  # or the test shows nothing
    pair = transformed(tokenizer, CHAT, TURN_END.replace("AFTER", after))
    assert tokenizer.decode(pair.chosen_ids) == "It is Paris.<|end|>"
    assert pair.chosen_loss_mask.all()


def test_special_tokens_that_open_and_close_a_call_are_no_stop(chatml):
    tokenizer = type(chatml)(tokenizer_object=chatml.backend_tokenizer, eos_token="<|im_end|>", chat_template="")
    tokenizer.add_tokens([AddedToken(token, special=True) for token in ("<call>", "</call>")])
    row = CHAT | {"chosen": [call({"a": 1})]}
    assert texts(tokenizer, row, TOOLS)[1] == '<call>weather {"a": 1}</call><|im_end|>'


# A prompt that ends in an assistant turn


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [user(QUESTION), assistant("It is")], "chosen": " Paris.", "rejected": " the sea."},
        {"prompt": [user(QUESTION), assistant("It is")], "chosen": [assistant(" Paris.")], "rejected": " the sea."},
        {"prompt": [user(QUESTION), assistant("It is")], "chosen": "It is Paris.", "rejected": "It is the sea."},
        {
            "prompt": [user(QUESTION), assistant("It is")],
            "chosen": [user(QUESTION), assistant("It is Paris.")],
            "rejected": [user(QUESTION), assistant("It is the sea.")],
        },
    ],
)
@pytest.mark.parametrize("name", ["chatml", "llama3", "mistral", "phi3"])
def test_an_opened_answer_is_gone_on_with_in_the_same_turn(make_tokenizer, families, name, row):
    tokenizer = make_tokenizer(name)
    prompt, chosen, rejected = texts(tokenizer, row)
    assert prompt.endswith("It is") and prompt.count("It is") == 1
    assert (chosen, rejected) == (" Paris." + families[name].stop, " the sea." + families[name].stop)


@pytest.mark.parametrize(
    "row",
    [
        {
            "prompt": [user("a"), assistant("b c")],
            "chosen": [assistant(" d"), user("e"), assistant("f")],
            "rejected": "g",
        },
        {"prompt": [user("a"), call({})], "chosen": [assistant(" d")], "rejected": [assistant(" g")]},
        {"prompt": [user("a"), assistant("It is")], "chosen": "It is Paris.", "rejected": " the sea."},
    ],
)
def test_an_opened_answer_that_cannot_be_gone_on_with_is_refused(chatml, row):
    assert refusal(chatml, row, TOOLS)


def test_an_empty_opened_answer_says_nothing(chatml):
    assert texts(chatml, CHAT | {"prompt": [user(QUESTION), assistant("")]}) == texts(chatml, CHAT)


def test_an_answer_that_quotes_its_question_is_a_good_row(chatml):
    row = CHAT | {"chosen": [assistant(QUESTION + " It is Paris.")]}
    assert texts(chatml, row)[1] == QUESTION + " It is Paris.<|im_end|>"
    row = {"prompt": QUESTION, "chosen": " " + QUESTION + " It is Paris.", "rejected": " Lyon."}
    assert texts(chatml, row)[1] == " " + QUESTION + " It is Paris.<|im_end|>"
    ids = list(range(10, 20))
    assert not isinstance(PreferenceTransform(chatml)({"prompt": ids, "chosen": [*ids, 3], "rejected": [4]}), RowFault)


# Impossible values


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("weight", 1e39), ("weight", 1e-46), ("weight", 10**400), ("weight", -(10**400)), ("weight", "1e400"),
        ("weight", np.bool_(True)), ("weight", float("nan")), ("ref_chosen_logps", 0.5), ("ref_chosen_logps", -1e39),
        ("ref_rejected_logps", np.float64("inf")), ("ref_rejected_logps", True),
    ],
)  # fmt: skip
def test_impossible_numbers_are_refused(chatml, column, value):
    row = CHAT | {"ref_chosen_logps": -1.0, "ref_rejected_logps": -1.0} | {column: value}
    assert refusal(chatml, row).field == column


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "column", ["prompt", "chosen", "tools", "chat_template_kwargs", "documents", "history", "weight"]
)
@pytest.mark.parametrize(
    "value",
    [
        nested(50_000), "[" * 50_000, '[{"role":' * 20_000, {"a": nested(50_000)},
        [{"role": "user", "content": nested(5000)}],
        [{"role": "assistant", "content": "a", "x": nested(5000)}], [call({"a": nested(5000)})], [call('{"a":' * 5000)],
        [call({"a": 10**5000})], [call({3: 4})], [assistant("a", x={("a",): 1})],
    ],
)  # fmt: skip
def test_nothing_is_too_deep_or_too_large_to_answer_for(chatml, column, value):
    result = transformed(chatml, CHAT | {column: value})
    may_be_text = (column in ("prompt", "chosen") and isinstance(value, str)) or column == "documents"
    assert isinstance(result, RowFault) or (may_be_text and isinstance(result, PreferencePair))


# Control characters


def shown(renderable):
    file = io.StringIO()
    Console(file=file, width=100).print(renderable)
    return file.getvalue()


HIDDEN = "\x1b[31m\x07\x7f\x9b\u202e\u2066\u200b"


def test_hidden_characters_are_shown_as_escapes_and_others_stay():
    assert visible("a\tb\nc é 日 🎈" + HIDDEN) == "a\tb\nc é 日 🎈" + r"\x1b[31m\x07\x7f\x9b\u202e\u2066\u200b"


@pytest.mark.parametrize(
    "row",
    [
        CHAT | {"chosen": [assistant(f"Paris {HIDDEN}.")]},
        CHAT | {"prompt": [{"role": HIDDEN, "content": "a"}]},
        {HIDDEN: 1, "chosen": "a"},
        CHAT | {"system": [HIDDEN]},
        CHAT | {"tools": HIDDEN},
        CHAT
        | {"chat_template_kwargs": {"chat_template": "{{ raise_exception(messages[0].content) }}"}, "prompt": HIDDEN},
    ],
)
def test_no_control_character_of_a_row_reaches_the_terminal(chatml, row):
    result = transformed(chatml, row)
    if isinstance(result, RowFault):
        assert not set(result.message) & set(HIDDEN[:1] + HIDDEN[5:])
        printed = shown(render_fault(result, f"{HIDDEN}.jsonl, row 1"))
    else:
        printed = shown(render_pair(result, chatml))
    assert not set(printed) & set(HIDDEN[:1] + HIDDEN[5:])
    assert r"\x1b" in printed


def test_a_number_of_any_length_can_be_described():
    assert describe([10**5000]) == "list [of 16610 bits]"

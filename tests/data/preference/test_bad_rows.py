"""Every way in which a row can be bad comes back as a fault that names the field, the reason and the fix."""

import numpy as np
import pytest

from easydel.data.faults import FAULT_REASONS, RowFault
from easydel.data.preference.transform import PreferenceTransform
from tests.tiny import WrappedTokenizer

pytestmark = pytest.mark.usefixtures("one_renderer")

QUESTION = "What is the capital of France, and why is it the capital?"
USER = {"role": "user", "content": QUESTION}
ANSWER = {"role": "assistant", "content": "The answer is Paris."}
OTHER = {"role": "assistant", "content": "The sea."}
CHAT = {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]}
TEXT = {"prompt": "User: Hello there.\nAssistant:", "chosen": " Hello.", "rejected": " I am sorry."}
IDS = {"prompt": [10, 11], "chosen": [12], "rejected": [13]}


def say(role, content):
    return [{"role": role, "content": content}]


BAD_ROWS = [
    # row, field, reason, words of the message
    ({"prompt": "a b", "chosen": "c"}, "rejected", "missing column", ['no column "rejected"', '"prompt", "chosen"']),
    ({"prompt": "a", "response_chosen": "b", "rejected": "c"}, "chosen", "missing column", ['{"response_chosen": "ch']),
    ({"question": "a", "chosen": "x y", "rejected": "x z"}, "prompt", "missing column", ['{"question": "prompt"}']),
    ({"Prompt": "a", "chosen": "x y", "rejected": "x z"}, "prompt", "missing column", ['{"Prompt": "prompt"}']),
    ({"chosen": "one", "rejected": "two"}, "prompt", "missing column", ["share no first words"]),
    ({"chosen": [ANSWER], "rejected": [OTHER]}, "prompt", "missing column", ["share no first messages"]),
    ({}, "chosen", "missing column", ["none"]),
    ("text", "row", "wrong type", ["str 'text'", "mapping"]),
    (TEXT | {"prompt": None}, "prompt", "no shared prompt", ["None"]),
    (TEXT | {"chosen": None}, "chosen", "missing value", ['"chosen" is None']),
    (CHAT | {"rejected": None}, "rejected", "missing value", ['"rejected" is None']),
    (TEXT | {"prompt": None, "chosen": "The wind", "rejected": "Theory"}, "prompt", "no shared prompt", ["words"]),
    (CHAT | {"chosen": [USER, ANSWER], "rejected": [say("user", "b")[0], OTHER]}, "rejected", "no shared prompt", []),
    (TEXT | {"chosen": 3}, "chosen", "wrong type", ["int 3", "expected text"]),
    (TEXT | {"prompt": float("nan")}, "prompt", "wrong type", ["float nan"]),
    (TEXT | {"chosen": b"bytes"}, "chosen", "wrong type", ["bytes"]),
    (CHAT | {"chosen": ANSWER}, "chosen", "wrong type", ["dict"]),
    (CHAT | {"chosen": ["text"]}, "chosen", "wrong type", ["list ['text']"]),
    (CHAT | {"chosen": [ANSWER, "text"]}, "chosen", "wrong type", ["message 1", "str 'text'"]),
    (CHAT | {"chosen": say("assistant", 3)}, "chosen", "wrong type", ["message 0", "int 3"]),
    (CHAT | {"prompt": say("user", [{"type": "image"}])}, "prompt", "wrong type", ["message 0", '"image"']),
    (CHAT | {"prompt": say("user", None)}, "prompt", "missing value", ["message 0", "None"]),
    (CHAT | {"prompt": [{"from": "human"}]}, "prompt", "missing value", ['"value"']),
    (CHAT | {"prompt": say("narrator", "a")}, "prompt", "unknown role", ["'narrator'", "user, assistant"]),
    (CHAT | {"prompt": [{"from": "me", "value": "a"}]}, "prompt", "unknown role", ["'me'", "human"]),
    (CHAT | {"prompt": [{"text": "a"}]}, "prompt", "unknown role", ["no role", '"text"']),
    (CHAT | {"prompt": say(["user"], "a")}, "prompt", "unknown role", ["['user']"]),
    (TEXT | {"chosen": ""}, "chosen", "empty completion", ["''"]),
    (TEXT | {"rejected": " \n"}, "rejected", "empty completion", []),
    (TEXT | {"rejected": "</s>"}, "rejected", "empty completion", ["after the chat template"]),
    (CHAT | {"chosen": []}, "chosen", "empty completion", ["no assistant message"]),
    (CHAT | {"chosen": [USER]}, "chosen", "empty completion", ["no assistant message"]),
    (CHAT | {"chosen": say("assistant", "\n ")}, "chosen", "empty completion", []),
    (CHAT | {"chosen": [ANSWER, USER, *say("assistant", "")]}, "chosen", "empty completion", []),
    (CHAT | {"rejected": " "}, "rejected", "empty completion", []),
    (IDS | {"chosen": []}, "chosen", "empty completion", []),
    (IDS | {"prompt": []}, "prompt", "empty prompt", []),
    (CHAT | {"prompt": []}, "prompt", "empty prompt", []),
    (CHAT | {"prompt": " "}, "prompt", "empty prompt", []),
    (TEXT | {"chosen": " Hello.", "rejected": " Hello."}, "rejected", "chosen equals rejected", []),
    (CHAT | {"rejected": [ANSWER]}, "rejected", "chosen equals rejected", []),
    (CHAT | {"rejected": ANSWER["content"]}, "rejected", "chosen equals rejected", []),
    (TEXT | {"rejected": " Hello.</s>"}, "rejected", "chosen equals rejected", ["once tokenised"]),
    (IDS | {"rejected": [12]}, "rejected", "chosen equals rejected", []),
    (
        TEXT | {"chosen": TEXT["prompt"] + " Hello.", "rejected": TEXT["prompt"] + " Hm."},
        "chosen",
        "prompt repeated in completion",
        [],
    ),
    (
        CHAT | {"chosen": QUESTION + " Paris.", "rejected": QUESTION + " Hm."},
        "chosen",
        "prompt repeated in completion",
        [],
    ),
    (
        {"prompt": list(range(10, 20)), "chosen": list(range(10, 22)), "rejected": [*range(10, 20), 30]},
        "chosen",
        "prompt repeated in completion",
        [],
    ),
    (IDS | {"chosen": [12, 100_000]}, "chosen", "bad value", ["100000"]),
    (IDS | {"prompt": [-1, 10]}, "prompt", "bad value", ["-1"]),
    (IDS | {"prompt": [[10], [11, 12]]}, "prompt", "wrong type", []),
    (IDS | {"prompt": [10, 1.5]}, "prompt", "wrong type", ["1.5"]),
    (IDS | {"prompt": [True, False]}, "prompt", "wrong type", ["True"]),
    (IDS | {"prompt": [10, None]}, "prompt", "wrong type", ["None"]),
    (IDS | {"prompt": np.ones((2, 2), int)}, "prompt", "wrong type", []),
    (IDS | {"prompt": None}, "prompt", "missing value", ["all three"]),
    (IDS | {"prompt": "text"}, "prompt", "wrong type", ["all three"]),
    (TEXT | {"weight": -1}, "weight", "bad value", ["-1"]),
    (TEXT | {"weight": float("inf")}, "weight", "bad value", ["inf"]),
    (TEXT | {"weight": "heavy"}, "weight", "wrong type", ["'heavy'"]),
    (TEXT | {"weight": True}, "weight", "wrong type", ["True"]),
    (TEXT | {"ref_chosen_logps": -1.0}, "ref_rejected_logps", "missing value", ["both"]),
    (TEXT | {"ref_chosen_logps": -1.0, "ref_rejected_logps": float("nan")}, "ref_rejected_logps", "bad value", []),
    (CHAT | {"tools": "not json"}, "tools", "bad value", ["not JSON"]),
    (CHAT | {"tools": {"name": "f"}}, "tools", "wrong type", ["a list"]),
    (CHAT | {"chat_template_kwargs": [1]}, "chat_template_kwargs", "wrong type", ["a mapping"]),
    (CHAT | {"chat_template_kwargs": {"tokenize": True}}, "prompt", "template error", ["tokenize"]),
    (CHAT | {"prompt": [*say("system", "Be kind."), USER]}, "prompt", "template error", ["Only user and", "system"]),
    (TEXT | {"chosen": "half \ud83c"}, "chosen", "bad value", ["surrogate"]),
]


@pytest.mark.parametrize(("row", "field", "reason", "words"), BAD_ROWS)
def test_a_bad_row_is_a_fault_that_says_what_and_where(mistral, row, field, reason, words):
    fault = PreferenceTransform(mistral, max_length=None, max_prompt_length=None)(row, 12)
    assert isinstance(fault, RowFault), fault
    assert (fault.index, fault.field, fault.reason) == (12, field, reason)
    assert reason in FAULT_REASONS
    for word in words:
        assert word in fault.message
    assert fault.structural == (reason == "missing column")


@pytest.mark.parametrize(
    ("limits", "row", "reason", "words"),
    [
        ({"max_length": 10, "max_prompt_length": None}, TEXT, "prompt over the limit", ["max_length=10"]),
        ({"max_length": 2, "max_prompt_length": 2}, IDS, "prompt over the limit", ["2 tokens"]),
        (
            {"max_completion_length": 2},
            IDS | {"chosen": [5, 6, 7], "rejected": [5, 6, 8]},
            "chosen equals rejected",
            ["cut"],
        ),
    ],
)
def test_a_row_that_the_limits_leave_nothing_of_is_a_fault(mistral, limits, row, reason, words):
    fault = PreferenceTransform(mistral, **limits)(row)
    assert isinstance(fault, RowFault), fault
    assert fault.reason == reason
    assert all(word in fault.message for word in words)


def test_an_empty_prompt_needs_a_bos_token(chatml, mistral):
    row = {"prompt": "", "chosen": "yes", "rejected": "no"}
    assert PreferenceTransform(chatml)(row).reason == "empty prompt"
    assert not isinstance(PreferenceTransform(mistral)(row), RowFault)


DROPS_TOOLS = (
    "{% for m in messages %}{% if m['role'] in ('user', 'assistant') %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SHOUTS_LAST_TURN = (
    "{% for m in messages %}{{ m['role'] + ': ' + (m['content'] | upper if loop.last else m['content']) + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "row", "field", "reason"),
    [
        (DROPS_TOOLS, CHAT | {"prompt": [*say("system", "Be kind."), USER]}, "prompt", "template error"),
        (DROPS_TOOLS, CHAT | {"prompt": [*say("developer", "Be kind."), USER]}, "prompt", "template error"),
        (SHOUTS_LAST_TURN, CHAT | {"chosen": [ANSWER, USER, OTHER]}, "chosen", "unstable template"),
        (
            DROPS_TOOLS,
            CHAT | {"chosen": [{"from": "function_call", "value": '{"name": "f", "arguments": {}}'}]},
            "chosen",
            "template error",
        ),
    ],
)
def test_what_a_template_swallows_or_rewrites_is_a_fault(make_tokenizer, template, row, field, reason):
    tokenizer = make_tokenizer("chatml")
    fault = PreferenceTransform(tokenizer, chat_template_kwargs={"chat_template": template})(row)
    assert isinstance(fault, RowFault), fault
    assert (fault.field, fault.reason) == (field, reason)


def test_a_tokenizer_without_a_chat_template_is_told_how_to_get_one(make_tokenizer):
    tokenizer = make_tokenizer("chatml", trim_offsets=True)
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        fault = PreferenceTransform(tokenizer)(CHAT)
        assert fault.reason == "no chat template" and fault.structural
        assert "tokenizer.chat_template = " in fault.message
        assert not isinstance(PreferenceTransform(tokenizer)(TEXT), RowFault)
    finally:
        tokenizer.chat_template = template


class SlowTokenizer:
    """A tokenizer that cannot give offsets, as the slow ones of `transformers`."""

    bos_token_id, eos_token_id, pad_token_id, all_special_ids = 1, 2, 2, (1, 2)

    def __len__(self):
        return 100

    def convert_ids_to_tokens(self, ids):
        return [f"<{token}>" for token in ids]

    def __call__(self, text, **kwargs):
        raise NotImplementedError("return_offset_mapping is not available when using Python tokenizers.")


def test_a_tokenizer_without_offsets_is_refused_for_good():
    fault = PreferenceTransform(SlowTokenizer())(TEXT)
    assert fault.reason == "unfit tokenizer" and fault.structural
    assert "SlowTokenizer" in fault.message and "AutoTokenizer" in fault.message


class NoEos(WrappedTokenizer):
    """A tokenizer without EOS."""

    eos_token_id = None


def test_a_tokenizer_without_eos_is_refused_where_one_is_needed(llama3):
    fault = PreferenceTransform(NoEos(llama3))(TEXT)
    assert fault.reason == "unfit tokenizer" and "eos_token" in fault.message
    assert not isinstance(PreferenceTransform(NoEos(llama3))(CHAT), RowFault)


@pytest.mark.parametrize("value", [None, 0, 1.5, "", "a", b"", [], {}, [None], [{}], [[]], [{"role": None}], object()])
@pytest.mark.parametrize("field", ["prompt", "chosen", "rejected", "weight", "tools", "chat_template_kwargs"])
def test_no_value_whatever_raises(mistral, field, value):
    for row in (CHAT, TEXT, IDS):
        PreferenceTransform(mistral)(row | {field: value})

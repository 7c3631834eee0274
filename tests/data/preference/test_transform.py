"""Rows become pairs: every accepted form, the boundary, BOS, the stop token, masks and limits."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from easydel.data.faults import RowFault
from easydel.data.preference.transform import PreferenceTransform
from easydel.data.tree import PreferencePair
from tests.tiny import WrappedTokenizer

pytestmark = pytest.mark.usefixtures("one_renderer")


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


UNLIMITED = {"max_length": None, "max_prompt_length": None}
CHAT_ROW = {
    "prompt": [user("What is the capital of France?")],
    "chosen": [assistant("The answer is Paris.")],
    "rejected": [assistant("The sea.")],
}
TEXT_ROW = {"prompt": "User: Hello there.\nAssistant:", "chosen": " Hello, how can I help?", "rejected": " I am sorry."}


def pair_of(tokenizer, row, **limits):
    result = PreferenceTransform(tokenizer, **(UNLIMITED | limits))(row, 7)
    assert isinstance(result, PreferencePair), result
    assert result.index == 7
    return result


def texts(tokenizer, pair):
    return tuple(tokenizer.decode(ids) for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids))


def same(one, other):
    return all(
        np.array_equal(getattr(one, field), getattr(other, field))
        for field in ("prompt_ids", "chosen_ids", "rejected_ids", "chosen_loss_mask", "rejected_loss_mask")
    )


# The forms of a row


def test_chat_row_is_rendered_by_the_template_and_split_where_the_answer_begins(chatml):
    assert texts(chatml, pair_of(chatml, CHAT_ROW)) == (
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n",
        "The answer is Paris.<|im_end|>",
        "The sea.<|im_end|>",
    )


def test_text_row_is_joined_as_given_and_ends_in_eos(mistral):
    assert texts(mistral, pair_of(mistral, TEXT_ROW)) == (
        "<s>User: Hello there.\nAssistant:",
        " Hello, how can I help?</s>",
        " I am sorry.</s>",
    )


def test_arrays_have_the_promised_types(chatml):
    pair = pair_of(chatml, CHAT_ROW)
    for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids):
        assert ids.dtype == np.int32 and ids.ndim == 1
    for mask, ids in ((pair.chosen_loss_mask, pair.chosen_ids), (pair.rejected_loss_mask, pair.rejected_ids)):
        assert mask.dtype == bool and mask.shape == ids.shape and mask.all()


MESSAGES = {field: CHAT_ROW[field] for field in CHAT_ROW}
TEXTS = {field: messages[0]["content"] for field, messages in MESSAGES.items()}
SHAREGPT = {
    "prompt": [{"from": "human", "value": TEXTS["prompt"]}],
    "chosen": [{"from": "gpt", "value": TEXTS["chosen"]}],
    "rejected": [{"from": "chatgpt", "value": TEXTS["rejected"]}],
}
PARTS = {
    field: [{"role": message["role"], "content": [{"type": "text", "text": message["content"]}]}]
    for field, (message,) in MESSAGES.items()
}


@pytest.mark.parametrize(
    "row",
    [
        MESSAGES | {"prompt": TEXTS["prompt"]},
        MESSAGES | {"chosen": TEXTS["chosen"]},
        TEXTS | {"rejected": MESSAGES["rejected"]},
        TEXTS | {"prompt": MESSAGES["prompt"]},
        SHAREGPT,
        SHAREGPT | {"prompt": TEXTS["prompt"], "rejected": MESSAGES["rejected"]},
        PARTS,
        {field: tuple(messages) for field, messages in MESSAGES.items()},
        {field: np.array(messages, object) for field, messages in MESSAGES.items()},
        {field: [message | {"tool_calls": None, "name": None} for message in MESSAGES[field]] for field in MESSAGES},
        MESSAGES | {"chosen": MESSAGES["prompt"] + MESSAGES["chosen"]},
        {"prompt": TEXTS["prompt"], **{f: MESSAGES["prompt"] + MESSAGES[f] for f in ("chosen", "rejected")}},
        {f: MESSAGES["prompt"] + MESSAGES[f] for f in ("chosen", "rejected")},
        {"prompt": None, **{f: MESSAGES["prompt"] + MESSAGES[f] for f in ("chosen", "rejected")}},
        {"prompt": [], **{f: MESSAGES["prompt"] + MESSAGES[f] for f in ("chosen", "rejected")}},
        MESSAGES | {"chosen": [*MESSAGES["chosen"], user("Thank you.")]},
    ],
)
def test_every_spelling_of_a_chat_row_gives_the_same_pair(chatml, row):
    assert same(pair_of(chatml, row), pair_of(chatml, CHAT_ROW))


def test_the_form_is_decided_row_by_row(mistral):
    transform = PreferenceTransform(mistral)
    ids = {"prompt": [5, 6], "chosen": [7], "rejected": [8]}
    for row in (TEXT_ROW, CHAT_ROW, ids, CHAT_ROW, TEXT_ROW):
        assert same(transform(row), PreferenceTransform(mistral)(row))


def test_completions_that_bring_more_context_than_the_prompt_column_keep_it_once(chatml):
    system = {"role": "system", "content": "I am a poet."}
    row = {
        "prompt": "Hello there.",
        **{f: [system, user("Hello there."), *CHAT_ROW[f]] for f in ("chosen", "rejected")},
    }
    explicit = CHAT_ROW | {"prompt": [system, user("Hello there.")]}
    assert same(pair_of(chatml, row), pair_of(chatml, explicit))


@pytest.mark.parametrize("columns", [("prompt", "chosen", "rejected"), ("prompt_ids", "chosen_ids", "rejected_ids")])
@pytest.mark.parametrize("kind", [list, tuple, np.array])
def test_token_ids_are_taken_as_they_are(mistral, columns, kind):
    row = dict(zip(columns, map(kind, ([9, 10], [11, 12, 13], [11]))))
    pair = pair_of(mistral, row)
    assert [pair.prompt_ids.tolist(), pair.chosen_ids.tolist(), pair.rejected_ids.tolist()] == [
        [9, 10],
        [11, 12, 13],
        [11],
    ]
    assert pair.chosen_loss_mask.all() and pair.rejected_loss_mask.all()


def test_a_pad_id_inside_token_ids_is_scored_like_any_other(mistral):
    pad = mistral.pad_token_id
    pair = pair_of(mistral, {"prompt": [9, pad], "chosen": [pad, 11, pad], "rejected": [12]})
    assert pair.chosen_loss_mask.tolist() == [True, True, True]


def test_optional_columns_reach_the_pair(chatml):
    weighted = CHAT_ROW | {"weight": 0.5, "ref_chosen_logps": -3.0, "ref_rejected_logps": np.float32(-4)}
    pair = pair_of(chatml, weighted)
    assert (pair.weight, pair.ref_chosen_logps, pair.ref_rejected_logps) == (0.5, -3.0, -4.0)


TOOL = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}


@pytest.mark.parametrize(
    ("columns", "tools", "kwargs"),
    [
        ({}, ["config"], {"mood": "config", "depth": 1}),
        ({"tools": [TOOL]}, [TOOL], {"mood": "config", "depth": 1}),
        ({"tools": '[{"name": "row"}]'}, [{"name": "row"}], {"mood": "config", "depth": 1}),
        ({"tools": []}, None, {"mood": "config", "depth": 1}),
        ({"chat_template_kwargs": {"mood": "row", "unset": None}}, ["config"], {"mood": "row", "depth": 1}),
    ],
)
def test_the_rows_own_tools_and_template_arguments_win(chatml, columns, tools, kwargs):
    given = []

    class Spy(WrappedTokenizer):
        def apply_chat_template(self, messages, *, tools, **rest):
            given.append((tools, {key: rest[key] for key in ("mood", "depth")}, sorted(rest)))
            return str(tools) + self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=rest["add_generation_prompt"]
            )

    spy = Spy(chatml)
    result = PreferenceTransform(spy, tools=["config"], chat_template_kwargs={"mood": "config", "depth": 1})(
        CHAT_ROW | columns
    )
    assert isinstance(result, PreferencePair), result
    expected_keys = sorted(["add_generation_prompt", "tokenize", *kwargs])
    assert given == [(tools, kwargs, expected_keys)] * 3


# The implicit prompt


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("Q: sea or sky? A: sea", "Q: sea or sky? A: sky", "<s>Q: sea or sky? A:"),
        ("The answer is not", "The answer is", "<s>The answer"),
        ("The wind\nblows", "The wind blows", "<s>The wind"),
        ("The wind blows", "The windmill turns", "<s>The"),
        ("a  bc", "a  bd", "<s>a"),
    ],
)
def test_an_implicit_text_prompt_ends_at_a_word(mistral, chosen, rejected, prompt):
    pair = pair_of(mistral, {"chosen": chosen, "rejected": rejected})
    assert texts(mistral, pair)[0] == prompt
    assert mistral.decode([*pair.prompt_ids, *pair.chosen_ids]) == f"<s>{chosen}</s>"
    assert mistral.decode([*pair.prompt_ids, *pair.rejected_ids]) == f"<s>{rejected}</s>"


@pytest.mark.parametrize(
    ("shared", "chosen", "rejected"),
    [
        ([user("a")], [assistant("b")], [assistant("c")]),
        ([user("a"), assistant("b"), user("c")], [assistant("d")], [assistant("e")]),
        ([user("a")], [assistant("b"), user("c"), assistant("d")], [assistant("b"), user("x"), assistant("e")]),
    ],
)
def test_an_implicit_chat_prompt_ends_with_the_last_shared_user_turn(chatml, shared, chosen, rejected):
    pair = pair_of(chatml, {"chosen": shared + chosen, "rejected": shared + rejected})
    expected = chatml.apply_chat_template(shared, tokenize=False, add_generation_prompt=True)
    assert texts(chatml, pair)[0] == expected


# The boundary of prompt and completion


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_a_token_across_the_boundary_belongs_to_both_completions(make_tokenizer, trim_offsets):
    tokenizer = make_tokenizer("mistral", trim_offsets=trim_offsets, merge_across_words=True)
    row = {"prompt": "I hope this helps!\n\nI am sorry.", "chosen": "\n\nBut I do not know.", "rejected": " Thanks"}
    whole = tokenizer(row["prompt"] + row["chosen"], add_special_tokens=False)["input_ids"]
    alone = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
    assert whole[: len(alone)] != alone  # or the test shows nothing
    pair = pair_of(tokenizer, row)
    assert [*pair.prompt_ids[1:], *pair.chosen_ids[:-1]] == whole
    prompt_text = tokenizer.decode(pair.prompt_ids[1:])
    assert row["prompt"].startswith(prompt_text) and prompt_text != row["prompt"]
    assert texts(tokenizer, pair)[2] == row["prompt"][len(prompt_text) :] + " Thanks</s>"
    assert pair.chosen_loss_mask.all() and pair.rejected_loss_mask.all()


@pytest.mark.parametrize("trim_offsets", [False, True])
@pytest.mark.parametrize(
    ("kept", "prompt", "space", "across"),
    [("I am sorry", "I am sorry.", "\n\n", ".\n\nBu"), ("Paris ", "Paris is", " ", "is ")],
)
def test_a_token_across_the_boundary_that_both_sides_share_is_completion_too(
    make_tokenizer, trim_offsets, kept, prompt, space, across
):
    tokenizer = make_tokenizer("mistral", trim_offsets=trim_offsets, merge_across_words=True)
    pair = pair_of(tokenizer, {"prompt": prompt, "chosen": f"{space}But no.", "rejected": f"{space}But yes."})
    assert texts(tokenizer, pair)[0] == "<s>" + kept
    assert tokenizer.decode(pair.chosen_ids[:1]) == tokenizer.decode(pair.rejected_ids[:1]) == across


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_a_space_that_is_a_token_of_its_own_stays_on_its_side(make_tokenizer, trim_offsets):
    tokenizer = make_tokenizer("mistral", trim_offsets=trim_offsets)
    pair = pair_of(tokenizer, {"prompt": "X ", "chosen": "  b", "rejected": "  c"})
    assert texts(tokenizer, pair)[0] == "<s>X "


def test_words_that_chosen_and_rejected_share_stay_completion(chatml):
    row = CHAT_ROW | {"chosen": [assistant("The answer is 42.")], "rejected": [assistant("The answer is 43.")]}
    assert texts(chatml, pair_of(chatml, row))[1:] == ("The answer is 42.<|im_end|>", "The answer is 43.<|im_end|>")


def test_an_emoji_of_several_tokens_is_never_torn_from_its_side(mistral):
    pair = pair_of(mistral, {"prompt": "Hello 🎈", "chosen": "🎉 yes", "rejected": "🎊 no"})
    assert texts(mistral, pair)[0] == "<s>Hello 🎈"
    assert mistral.decode([*pair.prompt_ids, *pair.chosen_ids]) == "<s>Hello 🎈🎉 yes</s>"


def with_template(tokenizer, template):
    class Templated(WrappedTokenizer):
        chat_template = template

        def apply_chat_template(self, messages, **kwargs):
            return self._tokenizer.apply_chat_template(messages, chat_template=template, **kwargs)

    return Templated(tokenizer)


THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)


def test_a_generation_prompt_that_the_answer_does_not_repeat_is_cut_where_they_part(chatml):
    pair = pair_of(with_template(chatml, THINKING), CHAT_ROW)
    assert texts(chatml, pair) == texts(chatml, pair_of(chatml, CHAT_ROW))


LATE_PROMPT = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + ('Now: ' if loop.last else '') + m['content']"
    " + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)


def test_a_template_that_rewrites_the_question_still_scores_only_the_answer(mistral):
    pair = pair_of(with_template(mistral, LATE_PROMPT), CHAT_ROW)
    assert texts(mistral, pair)[1].strip() == "The answer is Paris.</s>"
    assert "France" in texts(mistral, pair)[0]


def test_the_answer_is_found_even_where_the_question_quotes_it(mistral):
    row = CHAT_ROW | {"prompt": "Is it Paris. or not?", "chosen": "Paris."}
    assert texts(mistral, pair_of(with_template(mistral, LATE_PROMPT), row))[1].strip() == "Paris.</s>"


# BOS and stop tokens


@pytest.mark.parametrize("prompt", ["Hello", "<s>Hello", "<s><s>Hello"])
def test_plain_text_has_one_bos_however_often_it_is_written(mistral, prompt):
    pair = pair_of(mistral, {"prompt": prompt, "chosen": " you", "rejected": " there"})
    assert texts(mistral, pair)[0] == "<s>Hello"


def test_bos_alone_can_be_the_prompt(mistral):
    pair = pair_of(mistral, {"prompt": "", "chosen": "yes", "rejected": "no"})
    assert texts(mistral, pair) == ("<s>", "yes</s>", "no</s>")


@pytest.mark.parametrize("ending", ["", "</s>", "</s></s>", "</s>\n", "</s> </s>"])
def test_plain_text_ends_in_one_eos_however_often_it_is_written(mistral, ending):
    pair = pair_of(mistral, TEXT_ROW | {"chosen": " yes" + ending})
    assert texts(mistral, pair)[1] == " yes</s>"
    assert pair.chosen_loss_mask[-1]


def test_plain_text_that_ends_in_another_special_token_still_gets_eos(llama3):
    pair = pair_of(llama3, TEXT_ROW | {"chosen": " yes<|eot_id|>"})
    assert texts(llama3, pair)[1] == " yes<|eot_id|><|end_of_text|>"


FAMILY_NAMES = ("chatml", "llama3", "mistral", "llama2", "phi3", "no_special_tokens")


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_every_template_ends_an_answer_in_its_own_stop_token_once(make_tokenizer, families, name):
    tokenizer = make_tokenizer(name)
    stop = tokenizer.convert_tokens_to_ids(families[name].stop)
    pair = pair_of(tokenizer, CHAT_ROW)
    specials = set(tokenizer.all_special_ids)
    for ids, mask in ((pair.chosen_ids, pair.chosen_loss_mask), (pair.rejected_ids, pair.rejected_loss_mask)):
        assert ids[-1] == stop and mask[-1]
        assert not specials & set(ids[:-1].tolist())


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_every_template_opens_with_one_bos_or_with_none(make_tokenizer, families, name):
    tokenizer = make_tokenizer(name)
    count = pair_of(tokenizer, CHAT_ROW).prompt_ids.tolist().count(tokenizer.bos_token_id)
    family = families[name]
    assert count == (1 if family.adds_bos or "bos_token" in family.template else 0)


def test_a_stop_token_written_in_the_answer_is_not_doubled(chatml):
    row = CHAT_ROW | {"chosen": [assistant("The answer is Paris.<|im_end|>")]}
    assert same(pair_of(chatml, row), pair_of(chatml, CHAT_ROW))


# Several turns


MULTI_TURN = CHAT_ROW | {
    "chosen": [assistant("Paris."), user("Thank you."), assistant("I hope this helps!")],
    "rejected": [assistant("The sea."), user("What?"), assistant("I am sorry.")],
}


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_only_assistant_turns_of_a_long_completion_are_scored(make_tokenizer, families, name):
    tokenizer = make_tokenizer(name)
    pair = pair_of(tokenizer, MULTI_TURN)
    scored = tokenizer.decode(pair.chosen_ids[pair.chosen_loss_mask])
    family = families[name]
    between = "\n" if name == "no_special_tokens" else family.stop
    pieces = [piece.strip() for piece in scored.replace(family.stop, between).split(between) if piece.strip()]
    assert pieces == ["Paris.", "I hope this helps!"]
    assert "Thank you." in tokenizer.decode(pair.chosen_ids)
    if name != "no_special_tokens":
        assert scored.count(family.stop) == 2


def test_tool_turns_of_a_completion_are_not_scored(chatml):
    tool = [assistant("call f"), {"role": "tool", "content": "42"}, assistant("The answer is 42.")]
    pair = pair_of(chatml, CHAT_ROW | {"chosen": tool})
    scored = chatml.decode(pair.chosen_ids[pair.chosen_loss_mask])
    assert scored == "call f<|im_end|>The answer is 42.<|im_end|>"


# Limits


IDS = {"prompt": list(range(10, 20)), "chosen": list(range(20, 28)), "rejected": list(range(30, 33))}


@pytest.mark.parametrize(
    ("limits", "prompt", "chosen", "cut"),
    [
        ({}, range(10, 20), range(20, 28), (0, 0, 0)),
        ({"max_prompt_length": 4}, range(16, 20), range(20, 28), (6, 0, 0)),
        ({"max_prompt_length": 4, "truncation_mode": "keep_start"}, range(10, 14), range(20, 28), (6, 0, 0)),
        ({"max_completion_length": 5}, range(10, 20), range(20, 25), (0, 3, 0)),
        ({"max_length": 12}, range(10, 20), range(20, 22), (0, 6, 1)),
        ({"max_length": 12, "max_prompt_length": 5}, range(15, 20), range(20, 27), (5, 1, 0)),
        ({"max_length": 12, "max_completion_length": 1}, range(10, 20), range(20, 21), (0, 7, 2)),
    ],
)
def test_limits_are_in_tokens_and_what_they_cut_is_counted(mistral, limits, prompt, chosen, cut):
    pair = pair_of(mistral, IDS, **limits)
    assert pair.prompt_ids.tolist() == list(prompt)
    assert pair.chosen_ids.tolist() == list(chosen)
    assert (pair.prompt_truncated, pair.chosen_truncated, pair.rejected_truncated) == cut


@pytest.mark.parametrize("mode", ["keep_end", "keep_start"])
def test_a_cut_prompt_keeps_its_bos(mistral, mode):
    pair = pair_of(mistral, TEXT_ROW, max_prompt_length=3, truncation_mode=mode)
    assert pair.prompt_ids[0] == mistral.bos_token_id
    assert len(pair.prompt_ids) == 3
    whole = pair_of(mistral, TEXT_ROW).prompt_ids
    assert pair.prompt_ids[1:].tolist() == (whole[-2:] if mode == "keep_end" else whole[1:3]).tolist()


def test_a_cut_completion_has_no_stop_token(mistral):
    pair = pair_of(mistral, TEXT_ROW, max_completion_length=2)
    assert mistral.eos_token_id not in pair.chosen_ids


@pytest.mark.parametrize(
    "limits",
    [{"max_length": 1}, {"max_prompt_length": 0}, {"max_completion_length": -1}, {"truncation_mode": "keep_middle"}],
)
def test_limits_out_of_range_are_refused_at_once(mistral, limits):
    with pytest.raises(ValueError, match=next(iter(limits))):
        PreferenceTransform(mistral, **limits)


# Properties

words = st.text(st.sampled_from("abz .\n\t é🎈'日The"), min_size=1, max_size=30)
filled = words.filter(str.strip)


@settings(max_examples=150, deadline=None)
@given(
    prompt=filled,
    chosen=filled,
    rejected=filled,
    trim=st.booleans(),
    merge=st.booleans(),
    name=st.sampled_from(["mistral", "llama3"]),
)
def test_text_rows_decode_to_what_was_written(make_tokenizer, prompt, chosen, rejected, trim, merge, name):
    tokenizer = make_tokenizer(name, trim_offsets=trim, merge_across_words=merge)
    result = PreferenceTransform(tokenizer, **UNLIMITED)({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    if isinstance(result, RowFault):
        assert result.reason in ("chosen equals rejected", "prompt repeated in completion")
        return
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for ids, completion in ((result.chosen_ids, chosen), (result.rejected_ids, rejected)):
        whole = [*result.prompt_ids.tolist(), *ids.tolist()]
        assert whole.count(bos) == 1 and whole[0] == bos
        assert whole.count(eos) == 1 and whole[-1] == eos
        assert whole[1:-1] == tokenizer(prompt + completion, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(whole[1:-1]) == prompt + completion
    assert prompt.startswith(tokenizer.decode(result.prompt_ids[1:]).rstrip("\ufffd"))
    # A token left to both completions is one that reaches past the prompt on at least one side.
    reached = tokenizer.decode([*result.prompt_ids[1:], result.chosen_ids[0]])
    assert result.chosen_ids[0] != result.rejected_ids[0] or not prompt.startswith(reached)


@settings(max_examples=100, deadline=None)
@given(question=filled, chosen=filled, rejected=filled, name=st.sampled_from(FAMILY_NAMES))
def test_chat_rows_decode_to_what_the_template_renders(make_tokenizer, families, question, chosen, rejected, name):
    tokenizer, family = make_tokenizer(name), families[name]
    row = {"prompt": question, "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}
    result = PreferenceTransform(tokenizer, **UNLIMITED)(row)
    if isinstance(result, RowFault):
        assert result.reason in ("chosen equals rejected", "prompt repeated in completion")
        return
    for ids, answer in ((result.chosen_ids, chosen), (result.rejected_ids, rejected)):
        whole = [*result.prompt_ids.tolist(), *ids.tolist()]
        rendered = tokenizer.apply_chat_template([user(question), assistant(answer)], tokenize=False)
        decoded = tokenizer.decode(whole)
        if name == "no_special_tokens":
            assert decoded == "<s>" + rendered + "</s>"
        else:
            assert rendered.startswith(decoded)
            assert not rendered[len(decoded) :].replace(tokenizer.eos_token, "").strip()
        assert ids.tolist().count(tokenizer.convert_tokens_to_ids(family.stop)) == 1
    assert result.chosen_loss_mask.all() and result.rejected_loss_mask.all()


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.tuples(*[st.integers(1, 40)] * 3),
    max_length=st.none() | st.integers(2, 60),
    max_prompt_length=st.none() | st.integers(1, 30),
    max_completion_length=st.none() | st.integers(1, 30),
    mode=st.sampled_from(["keep_end", "keep_start"]),
)
def test_no_pair_is_longer_than_its_limits(
    mistral, lengths, max_length, max_prompt_length, max_completion_length, mode
):
    row = {
        field: [start + n for n in range(length)]
        for field, start, length in zip(("prompt", "chosen", "rejected"), (10, 60, 110), lengths)
    }
    limits = {
        "max_length": max_length,
        "max_prompt_length": max_prompt_length,
        "max_completion_length": max_completion_length,
    }
    pair = PreferenceTransform(mistral, **limits, truncation_mode=mode)(row)
    if isinstance(pair, RowFault):
        assert pair.reason == "prompt over the limit"
        assert min(lengths[0], max_prompt_length or lengths[0]) >= max_length
        return
    for ids, cut, length in zip(
        (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids),
        (pair.prompt_truncated, pair.chosen_truncated, pair.rejected_truncated),
        lengths,
    ):
        assert len(ids) + cut == length and len(ids) >= 1
    longest = max(len(pair.chosen_ids), len(pair.rejected_ids))
    assert len(pair.prompt_ids) <= (max_prompt_length or 99)
    assert longest <= (max_completion_length or 99)
    assert len(pair.prompt_ids) + longest <= (max_length or 999)


# Threads and real rows


def test_the_same_pairs_come_from_several_threads(real_rows, make_tokenizer):
    rows = real_rows[:60]
    expected = [*map(PreferenceTransform(make_tokenizer("llama3")), rows)]
    fresh = PreferenceTransform(make_tokenizer("llama3"))
    with ThreadPoolExecutor(4) as threads:
        assert all(map(same, threads.map(fresh, rows), expected))


def test_real_rows_are_all_used(real_rows, chatml):
    transform = PreferenceTransform(chatml)
    results = [transform(row, index) for index, row in enumerate(real_rows)]
    assert not [result for result in results if isinstance(result, RowFault)]
    stop = chatml.eos_token_id
    for pair in results:
        if isinstance(pair, PreferencePair):
            assert len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids)) <= 512
            assert (pair.chosen_ids[-1] == stop) == (pair.chosen_truncated == 0)
            assert (pair.rejected_ids[-1] == stop) == (pair.rejected_truncated == 0)

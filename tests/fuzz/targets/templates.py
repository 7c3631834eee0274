"""Chat templates are programs: Jinja of every construct, drawn from a grammar."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from easydel.data import PreferenceTransform
from tests.fuzz.inputs import damaged
from tests.fuzz.made import TEMPLATES, byte_tokenizer
from tests.fuzz.targets.rows import require_sound

# fmt: off
names = st.sampled_from(
    [
        "messages", "m", "loop", "tools", "bos_token", "eos_token", "x", "ns", "add_generation_prompt",
        "nothing", "self", "cycler", "namespace", "range", "dict", "lipsum", "joiner", "strftime_now",
        "raise_exception"
    ]
)
# fmt: on
numbers = st.sampled_from(["0", "1", "-1", "3", "1000", "10**5", "10**9", "2**64", "9**9**9", "1e308", "0.1"])
words = st.sampled_from(
    ["''", "'a'", "'<|im_end|>'", "'\\n'", "'%s'", "'{0.__class__}'", "'\\x1b[2J'", "'\\ud800'", "'é'"]
)
# fmt: off
attributes = st.sampled_from(
    [
        "role", "content", "first", "last", "index0", "length", "__class__", "__init__", "append", "format",
        "mro", "items", "join", "upper", "strip", "split", "get", "update"
    ]
)
filters = st.sampled_from(
    [
        "trim", "tojson", "length", "list", "join", "upper", "safe", "sum", "sort", "reverse", "first",
        "last", "string", "int", "float", "center(10**9)", "indent(10**8)", "batch(1)", "slice(10**9)",
        "replace('', 'aa')", "wordwrap(1)", "format(1)", "map('upper')", "map(attribute='content')",
        "selectattr('role')", "groupby('role')", "pprint", "xmlattr", "urlize", "unique", "random",
        "tojson(indent=10**7)", "default('x')", "attr('__class__')", "filesizeformat", "round(10**6)",
        "nothing"
    ]
)
# fmt: on
tests = st.sampled_from(["defined", "none", "string", "mapping", "divisibleby(0)", "sameas(x)", "iterable", "nothing"])

operators = st.sampled_from([*["+", "-", "*", "/", "//", "%", "**", "~", "and", "or", "==", "<", "in"], "not in"])


def _expressions(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    pair = st.tuples(inner, inner)
    return st.one_of(
        st.builds("({0} {2} {1})".format, inner, inner, operators),
        st.builds("{}.{}".format, inner, attributes),
        st.builds("{}[{}]".format, inner, inner),
        st.builds("{} | {}".format, inner, filters),
        st.builds("({} is {})".format, inner, tests),
        st.builds("{}({})".format, inner, inner),
        st.builds("{}.{}({})".format, inner, attributes, inner),
        st.builds("range({})".format, inner),
        st.builds("[{}]".format, inner),
        st.builds("{{'a': {}}}".format, inner),
        st.builds("{}[{}:]".format, inner, inner),
        pair.map(lambda two: f"({two[0]} if {two[1]} else {two[0]})"),
    )  # fmt: skip


expressions = st.recursive(names | numbers | words, _expressions, max_leaves=5)


def _statements(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.builds("{{% for m in {} %}}{}{{% endfor %}}".format, expressions, inner),
        st.builds("{{% for m in messages %}}{}{{% endfor %}}".format, inner),
        st.builds("{{% for x in range({}) %}}{}{{% endfor %}}".format, numbers, inner),
        st.builds(
            "{{% for x in [1, [1, [1]]] recursive %}}{}{{{{ loop({}) }}}}{{% endfor %}}".format, inner, expressions
        ),
        st.builds("{{% if {} %}}{}{{% else %}}{}{{% endif %}}".format, expressions, inner, inner),
        st.builds("{{% set x = {} %}}{}".format, expressions, inner),
        st.builds("{{% set ns = namespace(a={}) %}}{{% set ns.a = ns.a * 2 %}}{}".format, expressions, inner),
        st.builds("{{% macro f(a) %}}{}{{{{ f(a) }}}}{{% endmacro %}}{{{{ f({}) }}}}".format, inner, expressions),
        st.builds("{{% macro f(a) %}}{}{{% endmacro %}}{{{{ f({}) }}}}".format, inner, expressions),
        st.builds("{{% call f({}) %}}{}{{% endcall %}}".format, expressions, inner),
        st.builds("{{% filter {} %}}{}{{% endfilter %}}".format, filters, inner),
        st.builds("{{% generation %}}{}{{% endgeneration %}}".format, inner),
        st.builds("{{% include {} %}}{}".format, words, inner),
        st.builds("{{% set x %}}{}{{% endset %}}{{{{ x * {} }}}}".format, inner, numbers),
        st.builds("{}{}".format, inner, inner),
        st.builds("{{% raw %}}{}{{% endraw %}}".format, inner),
    )


pieces = st.sampled_from(
    ["{{ m.content }}", "{{ m['role'] }}", "<|im_end|>\n", "text", "{{ x }}", "{% break %}", "{#", "{{", "%}"]
)
programs_of_the_grammar = st.recursive(pieces | expressions.map("{{{{ {} }}}}".format), _statements, max_leaves=5)
# The classics, so that no seed misses them.
BOMBS = [
    "{% for i in range(10**9) %}x{% endfor %}",
    "{% for i in range(10**5) %}{% for j in range(10**5) %}{% endfor %}{% endfor %}",
    "{{ 'x' * 10**9 }}",
    "{{ range(10**9) | list }}",
    "{{ [0] * 10**10 }}",
    "{{ 9 ** 9 ** 9 }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ 'a' | center(10**10) }}",
    "{{ 1 / 0 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "{{ messages[0].__class__.__mro__ }}",
    "{{ lipsum.__globals__ }}",
    "{{ strftime_now('%Y' * 10**7) }}",
    "{{ messages | tojson(indent=10**8) }}",
    "{{ (messages | string * 10**8) | upper }}",
    "{{ 'a' | replace('', 'b' * 10**5) | replace('b', 'c' * 10**6) }}",
    "(" * 300 + "{{ " + "(" * 300 + "1" + ")" * 300 + " }}",
    "{% if 1 %}" * 300 + "x" + "{% endif %}" * 300,
]
ROW = {
    "prompt": [{"role": "user", "content": "Is tea hot?"}],
    "chosen": [{"role": "assistant", "content": "Yes, it is."}],
    "rejected": [{"role": "assistant", "content": "No."}],
}


def programs(work: Path) -> Any:
    """A chat template, given to a tokenizer that a row then goes through."""
    tokenizer = byte_tokenizer(None)
    bent = damaged(*(template.encode() for template in TEMPLATES)).map(lambda data: data.decode("utf-8", "replace"))

    def run(template: str) -> Any:
        tokenizer.chat_template = template
        pair = PreferenceTransform(tokenizer)(ROW, 3)
        if hasattr(pair, "prompt_ids"):
            require_sound(pair, len(tokenizer))
        return pair

    return programs_of_the_grammar | bent | programs_of_the_grammar | st.sampled_from(BOMBS), run

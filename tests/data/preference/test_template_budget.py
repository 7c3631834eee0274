"""Chat templates that do harm: each becomes a fault in seconds, and this process lives on as it was."""

from __future__ import annotations

import concurrent.futures
import copy
import datetime
import gc
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from easydel.data.batching.first_rows import check_first_rows
from easydel.data.faults import BadRow, DataError, RowFault
from easydel.data.preference.template_process import TemplateFailure, TemplateProcess, shared_process
from easydel.data.preference.template_renderer import TemplateRenderer
from easydel.data.preference.template_worker import TEMPLATE_CHARACTERS
from easydel.data.preference.transform import PreferenceTransform
from easydel.data.sources.base import ShardedDataSource
from easydel.data.tree import PreferencePair
from tests.data.conftest import make_chat_tokenizer
from tests.data.preference.test_template_rendering import CHATML, say, special_tokens

ROOT = Path(__file__).parents[3]
NOW = datetime.datetime(2025, 3, 1)
MESSAGES = [say("user", "Name a sea.")]
ROW = {"prompt": MESSAGES, "chosen": [say("assistant", "The North Sea.")], "rejected": [say("assistant", "No.")]}


def fault_of(template: object) -> BadRow:
    renderer = TemplateRenderer(special_tokens(template), NOW).for_row(None, {})
    with pytest.raises(BadRow) as caught:
        renderer.render(MESSAGES, "prompt", generation_prompt=True)
    assert caught.value.reason == "template error" and len(caught.value.message) < 500
    assert all(character.isprintable() for character in caught.value.message)
    return caught.value


# `n` is 1, and not known before there are messages: what is constant is worked out when a template is compiled.
N = "{% set n = messages | length %}"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "2 s of processor time"),
        (N + "{{ 10 ** (n * 10 ** 9) }}", "2 s of processor time"),
        ("{{ 10 ** (10 ** 9) }}", "2 s of processor time"),
        ("{{ 'x' * 10 ** 9 }}", "MiB of memory"),
        (N + "{{ 'x' * (n * 10 ** 9) }}", "MiB of memory"),
        ("{{ 'a' | center(10 ** 9) }}", "MiB of memory"),
        ("{{ messages[0].content | indent(10 ** 9, true) }}", "MiB of memory"),
        ("{{ '%1000000000d' % 1 }}", "MiB of memory"),
        ("{{ '{:>1000000000}'.format(messages | length) }}", "MiB of memory"),
        ("{{ ('x' * 10 ** 5).replace('x', 'x' * 10 ** 5) }}", "MiB of memory"),
        ("{{ messages | tojson(indent=10 ** 9) }}", "MiB of memory"),
        (N + "{% set x = [0] * (n * 10 ** 9) %}", "MiB of memory"),
        (
            "{% set ns = namespace(a='x') %}{% for i in range(99) %}{% set ns.a = ns.a + ns.a %}{% endfor %}",
            "MiB of memory",
        ),
        ("{{ 'x' * 9 * 10 ** 6 }}", "it writes 9000000 characters, expected at most 100"),
        ("{% for i in range(99999) %}{{ messages[0].content * 9 }}{% endfor %}", "characters, expected at most"),
    ],
)
def test_a_template_beyond_its_budget_is_a_structural_fault(template, said):
    fault = fault_of(template)
    assert fault.structural and said in fault.message


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in messages %}\n{{ m.x }\n{% endfor %}", "line 2: unexpected '}'"),
        ("a\n\n{{ 'x' | nope }}", "line 3: No filter named 'nope'"),
        ("{% if x %}", "line 1: Unexpected end of template"),
        ("{{ " + "(" * 100_000, "RecursionError"),
        ("{{ " + "[" * 5000 + "]" * 5000 + " }}", "RecursionError"),
        ("{% if 1 %}" * 5000 + "{% endif %}" * 5000, "RecursionError"),
        ("{% for i in [1] %}" * 30 + "{% endfor %}" * 30, "too many statically nested blocks"),
        ("{{ " + "-" * 50_000 + "1 }}", "RecursionError"),
        ("x" * 50_000_000, f"it has 50000000 characters, expected at most {TEMPLATE_CHARACTERS}"),
        ({"default": 7}, "it is int 7, expected text"),
    ],
)
def test_what_is_no_template_is_a_structural_fault_that_says_where(template, said):
    fault = fault_of(template)
    assert fault.structural and said in fault.message


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for i in range(10 ** 9) %}{% endfor %}", "line 1: OverflowError: Range too big"),
        ("\n{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "line 2: RecursionError"),
        ("{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}", "RecursionError"),
        ("{{ 1 / (messages | length - 1) }}", "ZeroDivisionError"),
        ("{% include 'other' %}", "no loader for this environment"),
        ("{% import 'os' as os %}", "no loader for this environment"),
        ("{{ raise_exception('\x1b[31mred' * 10 ** 5) }}", "\\x1b[31mred"),
        ("{{ ''.__class__.__mro__ }}", "'__class__' of 'str' object is unsafe"),
        ("{{ messages.append(1) }}", "'append' of 'list' object is unsafe"),
        ("{{ namespace.__init__.__globals__ }}", "'__init__' of 'type' object is unsafe"),
        ("{{ cycler.__init__.__globals__.os }}", "unsafe"),
        ("{{ (messages | attr('__class__')).mro() }}", "unsafe"),
        ("{{ dict.__class__.__base__ }}", "unsafe"),
        ("{% set ns = namespace() %}{% set ns._x = 1 %}", "begin with an underscore: '_x'"),
        ("{{ namespace(__class__=1) }}", "begin with an underscore: '__class__'"),
        ("{{ raise_exception.__globals__.sys }}", "unsafe"),
        ("{{ strftime_now.__globals__.sys }}", "unsafe"),
    ],
)
def test_a_template_that_fails_on_a_row_is_that_rows_fault(template, said):
    fault = fault_of(template)
    assert not fault.structural and said in fault.message


def test_a_good_template_renders_after_every_bad_one():
    good = TemplateRenderer(special_tokens("{{ messages[0].content }}"), NOW)
    for bad in ("{{ 'x' * 10 ** 9 }}", "{{ 1 / 0 }}", "{{"):
        fault_of(bad)
        assert good.for_row(None, {}).render(MESSAGES, "prompt") == "Name a sea."


def test_this_process_stays_as_small_as_it_was():
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fault_of("{{ 'x' * 3 * 10 ** 8 }}")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


def test_a_run_is_refused_at_its_first_row(chatml):
    class Rows(ShardedDataSource):
        shard_names = ("rows",)
        has_random_access = True

        def open_shard(self, name):
            return iter([ROW] * 1000)

        def shard_length(self, name):
            return 1000

    tokenizer = copy.copy(chatml)
    tokenizer.chat_template = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    start = time.process_time()
    with pytest.raises(DataError, match="row 0: the chat template cannot be used: it takes more than 2 s"):
        check_first_rows(Rows(), PreferenceTransform(tokenizer), 0.05)
    assert time.process_time() - start < 1


def test_a_tokenizers_own_method_may_raise_anything(chatml):
    class Own:
        def __init__(self, error):
            self._error = error

        def __getattr__(self, name):
            return getattr(chatml, name)

        def __len__(self):
            return len(chatml)

        def __call__(self, *args, **kwargs):
            return chatml(*args, **kwargs)

        def apply_chat_template(self, messages, **kwargs):
            if self._error is None:
                return ["not text"]
            raise self._error

    for error in (RecursionError("deep"), ZeroDivisionError("zero"), AttributeError("none"), OSError("disk"), None):
        fault = PreferenceTransform(Own(error))(ROW)
        assert isinstance(fault, RowFault) and fault.reason == "template error"
        assert (type(error).__name__ if error else "expected text") in fault.message


# The process


REQUEST = b'"now": "2025-03-01T00:00:00", "variables": {}, "messages": [], "conversations": [[[], false]]'


def child_of(process: TemplateProcess) -> int:
    assert process.render("x", REQUEST) == ["x"]
    return process.pid


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_all_transforms_share_one_process_which_ends_with_the_last_of_them(chatml):
    gc.collect()
    transforms = [PreferenceTransform(chatml) for _ in range(3)]
    assert all(isinstance(transform(ROW), PreferencePair) for transform in transforms)
    pid = child_of(shared_process())
    del transforms[1:]
    assert child_of(shared_process()) == pid
    others = [item for item in gc.get_objects() if isinstance(item, TemplateProcess)]
    assert others == [shared_process()]
    del others, transforms
    gc.collect()
    assert not is_running(pid)


def test_a_template_is_compiled_once():
    process = TemplateProcess()
    for _ in range(3):
        process.compile(CHATML)
    assert process.compiled == (CHATML,)


def test_rows_may_bring_any_number_of_templates():
    process = TemplateProcess()
    for number in range(150):
        assert process.render(f"{number}", REQUEST) == [str(number)]


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSEGV])
def test_a_process_that_is_ended_from_outside_is_replaced(end):
    process = TemplateProcess()
    first = child_of(process)
    os.kill(first, end)
    assert child_of(process) != first


@pytest.mark.parametrize("harmless", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_to_the_trainer_do_not_end_the_process(harmless):
    process = TemplateProcess()
    pid = child_of(process)
    assert os.getsid(pid) != os.getsid(0)
    os.kill(pid, harmless)
    assert child_of(process) == pid


def test_threads_get_each_their_own_answers():
    process = TemplateProcess()

    def ask(number: int) -> str:
        request = REQUEST.replace(b'"variables": {}', b'"variables": {"number": %d}' % number)
        (text,) = process.render(f"{number % 7}: {{{{ number }}}}", request)
        assert isinstance(text, str)
        return text

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(400))) == [f"{number % 7}: {number}" for number in range(400)]


def test_an_interrupted_request_leaves_no_answer_behind():
    process = TemplateProcess()
    child_of(process)
    slow = "{% for i in range(99999) %}{% set x = i ** 9 %}{% endfor %}slow"
    process.compile(slow)
    # A job in the background starts with this signal ignored, and a signal to another thread wakes no read of this one.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.01, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        while timer.is_alive():
            process.render(slow, REQUEST)
    timer.join()
    signal.signal(signal.SIGINT, before)
    assert process.render("quick", REQUEST) == ["quick"]


def render_elsewhere(transform: PreferenceTransform) -> list[int]:
    pair = transform(ROW)
    assert isinstance(pair, PreferencePair), pair
    return pair.prompt_ids.tolist()


def check_other_processes(method: str) -> None:
    transform = PreferenceTransform(make_chat_tokenizer("chatml"), now=NOW)
    expected = render_elsewhere(transform)
    pid = child_of(shared_process())
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.map(render_elsewhere, [transform] * 4) == [expected] * 4
    assert render_elsewhere(transform) == expected and child_of(shared_process()) == pid


def check_fork_that_only_ends() -> None:
    transform = PreferenceTransform(make_chat_tokenizer("chatml"))
    render_elsewhere(transform)
    pid = child_of(shared_process())
    if os.fork() == 0:
        sys.exit()  # with all that is done at an exit
    os.wait()
    assert child_of(shared_process()) == pid


@pytest.mark.parametrize(
    "check", ["check_other_processes('fork')", "check_other_processes('spawn')", "check_fork_that_only_ends()"]
)
def test_a_transform_works_in_other_processes_and_leaves_this_one_alone(check):
    # Forks of the tests' own process, with its threads, could hang.
    code = f"if __name__ == '__main__':\n  from {__name__} import *\n  {check}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_transform_keeps_its_time_when_it_is_copied(chatml):
    assert pickle.loads(pickle.dumps(PreferenceTransform(chatml, now=NOW))).now == NOW


def test_the_process_dies_with_the_one_that_made_it_however_that_dies():
    code = (
        "import os, sys\nfrom easydel.data.preference.template_process import TemplateProcess\n"
        "process = TemplateProcess(); process.compile('x')\nprint(process.pid, flush=True)\n"
        "os.kill(os.getpid(), 9) if sys.argv[1] == 'killed' else None"
    )
    for end in ("killed", "done"):
        done = subprocess.run([sys.executable, "-c", code, end], capture_output=True, text=True, check=False)
        assert done.stderr == ""
        deadline = time.monotonic() + 10
        while is_running(int(done.stdout)) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not is_running(int(done.stdout)), end


def test_a_process_that_cannot_be_started_is_a_fault_that_says_so(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(TemplateFailure, match="cannot be started: No such file") as caught:
        TemplateProcess().compile("x")
    assert caught.value.is_structural


def test_the_process_works_without_limits_where_the_system_has_none():
    code = (
        "import sys; sys.modules['resource'] = None\nimport signal; del signal.setitimer\n"
        "from easydel.data.preference import template_worker; template_worker.main()"
    )
    request = b'{"source": "x"}'
    done = subprocess.run(
        [sys.executable, "-c", code], input=len(request).to_bytes(8, "big") + request, capture_output=True, check=True
    )
    assert done.stdout == (9).to_bytes(8, "big") + bytes(9) and done.stderr == b""

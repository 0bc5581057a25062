"""A copy of a function with a probe in it does what the function does, and sees what a wrapper would."""

import gc
import importlib.util
import inspect
import itertools
import linecache
import os
import re
import sys
import textwrap
import traceback
import weakref

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_trace.events import BlocksTaken, RequestFreed
from vllm_trace.hooks.table import Hook, Probe, probe
from vllm_trace.hooks.weave import PREFIX, CannotWeave, is_woven, unweave, weave
from vllm_trace.hooks.wrap import make_wrapper
from vllm_trace.options import Options
from vllm_trace.recorder import Recorder

POOL = "vllm.v1.core.block_pool:BlockPool"
_serial = itertools.count()

RECORDER = Recorder(Options(dir=os.devnull))


@pytest.fixture(autouse=True)
def nothing_pending():
    yield
    RECORDER.pending.clear()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("modules")


def module_of(folder, text):
    path = folder / f"woven_{next(_serial)}.py"
    path.write_text(textwrap.dedent(text))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def copy_of(function, a_probe, make=weave, recorder=None):
    recorder = recorder or RECORDER
    failed = []
    made = make(function, a_probe, recorder=recorder, failed=failed.append, clock=lambda: 5)
    assert not failed
    return made


CALLS = []


@probe()
def returned(result, x):
    CALLS.append(("returned", x, result))


def outcomes(function, values):
    """What the calls give, and what the probe saw of each."""
    found = []
    for value in values:
        CALLS.clear()
        try:
            found.append((function(value), *CALLS))
        except Exception as error:
            lines = [
                f.lineno
                for f in traceback.extract_tb(error.__traceback__)
                if "woven_" in f.filename
            ]
            found.append((type(error), str(error), lines, *CALLS))
    return found


# Functions of one argument, put together at random ----------------------------------------

SIMPLE = [
    "x = x + 1",
    "y = y * 2 + x",
    "total += x",
    "seen.append(x)",
    "result = 'theirs'",
    "started = ended = error = None",
    "x, y = y, x",
    "def inner(): return x + 1\ny = inner()",
    "y = [x for x in range(3)][-1]",
    "y = (lambda x: x * 3)(y)",
    "y = os.path.join('a', str(y)).count('a')",
    "y = dedent(str(y)).count('1')",
    "del total\ntotal = y",
    "for x in range(2): pass",
    "if (x := x - 1) < -5: y = 3",
    "import math as x\nx = 4",
]
ENDS = [
    "return",
    "return x",
    "return result if total > 3 else y",
    "return [x, y, total]",
    "return inner() if 'inner' in dir() else seen",
    "raise KeyError(x)",
    "1 // x",
    "assert y < 100, 'too much'",
]
AROUND = [
    "if x % 2:\n{0}\nelse:\n{1}",
    "for i in range(2):\n{0}\n    if i: break\nelse:\n{1}",
    "n = 0\nwhile n < 3:\n    n += 1\n{0}\n{1}",
    "try:\n{0}\nexcept KeyError as error:\n{1}\n    seen.append(str(error))",
    "try:\n{0}\nfinally:\n    seen.append('finally')\n{1}",
    "with suppress(ZeroDivisionError):\n{0}\n{1}",
    "match y:\n    case 0 | 2:\n{2}\n    case x:\n{3}",
]


def block(inner):
    lines = st.lists(
        st.one_of(st.sampled_from(SIMPLE), st.sampled_from(ENDS), inner), min_size=1, max_size=4
    )
    return lines.map("\n".join)


def nested(inner):
    def put(parts):
        shape, first, second = parts
        one, two = (textwrap.indent(part, "    ") for part in (first, second))
        deep = [textwrap.indent(part, "    ") for part in (one, two)]
        return shape.format(one, two, *deep)

    return st.tuples(st.sampled_from(AROUND), block(inner), block(inner)).map(put)


BODIES = block(st.recursive(st.sampled_from(SIMPLE), nested, max_leaves=6))


@given(BODIES)
def test_any_function_gives_and_raises_what_the_original_does_and_the_probe_sees_what_a_wrapper_s_does(
    folder, body
):
    text = f'''\
import os.path
from contextlib import suppress
from textwrap import dedent


def function(x):
    """Its own words,
        over two lines."""
    y = total = 0
    result, seen = "own", []
{textwrap.indent(body, "    ")}
'''
    try:
        compile(text, "function", "exec")
    except SyntaxError:  # for one, code after a pattern that matches all
        return
    function = module_of(folder, text).function
    values = [-3, 0, 1, 2, 7]
    expected = outcomes(copy_of(function, returned, make=make_wrapper), values)
    try:
        woven = copy_of(function, returned)
    except CannotWeave as error:
        assert "a return is not the last" in str(error) and re.search("with |finally:", text)
        return
    assert expected == outcomes(woven, values)
    assert inspect.getsource(function) == inspect.getsource(woven)
    assert function.__doc__ == woven.__doc__
    hash(woven.__code__)


# One by one -------------------------------------------------------------------------------


def test_parameters_are_those_that_were_passed_whatever_the_function_makes_of_them(folder):
    function = module_of(
        folder,
        """
        def function(x):
            def inner():
                nonlocal x
                x = "inner"
            inner()
            return x
        """,
    ).function
    assert [("inner", ("returned", 1, "inner"))] == outcomes(copy_of(function, returned), [1])


SWITCH, TABLE, LIMITS = False, {"a": 1}, (1, 2)


@probe()
def careful(append, result, x):
    if SWITCH:
        append(RequestFreed(1))
    if not TABLE or (SWITCH and x):
        append(RequestFreed(2))
    if x in (LIMITS, x) and LIMITS[1] == 2 and LIMITS * 2 == (1, 2, 1, 2) and len(TABLE) == 1:
        append(BlocksTaken(sorted(LIMITS, key=lambda one: (one + x) % 7)))


def test_what_a_probe_names_is_the_object_and_not_what_the_compiler_made_of_a_constant(folder):
    function = module_of(folder, "def function(x): return x").function
    recorder = Recorder(Options(dir=os.devnull))
    woven = copy_of(function, careful, recorder=recorder)
    assert 5 == woven(5)
    assert [BlocksTaken([2, 1])] == recorder.pending
    recorder.pending.clear()
    hash(woven.__code__)


@probe()
def timed(append, started, ended, result):
    append(BlocksTaken([started, ended]))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("def outer(n):\n    def function(x): return n\n    return function\nfunction = outer(1)", "closure"),
        ("def function(x): yield x", "generator"),
        ("class A:\n    def function(self, x): return self.__x\nfunction = A.function", "not what runs"),
        ("function = eval('lambda x: x')", "no source"),
        ("function = lambda x: x", "no source"),
        ("async def function(x): return x", "no source"),
        (f"def function(x):\n    {PREFIX}result = 1\n    return x", "names that begin"),
        ("def function(result): return result", "parameter named"),
        ("def function(x):\n    try: return x\n    finally: x.close()", "not the last"),
        ("def function(x):\n    with x:\n        if x: return 1", "not the last"),
    ],
    ids=["closure", "generator", "private names", "eval", "lambda", "async", "our names", "result",
        "finally", "with"],
)  # fmt: skip
def test_what_cannot_be_copied_for_certain_is_refused(folder, text, reason):
    function = module_of(folder, text).function
    with pytest.raises(CannotWeave, match=reason):
        copy_of(function, timed)


def test_a_method_with_all_that_stands_around_it_and_functions_inside_is_copied(folder):
    module = module_of(
        folder,
        """
        import functools
        from os import path as where, sep

        class A:
            @staticmethod
            @(lambda function: function)
            def function(x: "no such" = (lambda: 3)(), *rest: int, key: str = sep) -> "nothing":
                def inner(y):
                    return [where.join(str(y), key) for _ in range(2)], sep.join("ab")
                return inner(x)
        """,
    )
    function = module.A.function
    if sys.version_info < (3, 11):  # the name of the class is among the constants there
        with pytest.raises(CannotWeave, match="not what runs"):
            copy_of(function, returned)
        return
    woven = copy_of(function, returned)
    assert is_woven(woven)
    CALLS.clear()
    assert function() == woven()
    assert [("returned", 3, function())] == CALLS
    assert function(5, 6, key="k") == woven(5, 6, key="k")


@pytest.mark.parametrize(("old", "new"), [("1, 2", "1.0, 2"), ("0.0", "-0.0"), ("1 in", "True in")])
def test_a_constant_that_equals_the_one_that_runs_and_is_another_is_refused(folder, old, new):
    text = "def function(x):\n    return 1 in (x, 0.0), (1, 2)\n"
    assert old in text
    module = module_of(folder, text)
    with open(module.__file__, "w") as file:
        file.write(text.replace(old, new))
    linecache.checkcache(module.__file__)
    with pytest.raises(CannotWeave, match="not what runs"):
        copy_of(module.function, timed)


def test_a_file_that_changed_after_it_was_imported_is_refused(folder):
    module = module_of(folder, "def function(x):\n    return x + 1\n")
    with open(module.__file__, "w") as file:
        file.write("def function(x):\n    return x + 2\n")
    linecache.checkcache(module.__file__)
    with pytest.raises(CannotWeave, match="not what runs"):
        copy_of(module.function, timed)
    assert 2 == module.function(1)


def test_what_cannot_be_woven_is_wrapped(fake):
    cls = fake.cls("BlockPool")
    original = cls.get_new_blocks
    cls.get_new_blocks = theirs = lambda self, num_blocks: original(self, num_blocks + 1)
    done = fake.install(hook("get_new_blocks"))
    assert not is_woven(cls.get_new_blocks)
    assert [0, 1, 2] == cls(4).get_new_blocks(2)
    done.undo()
    assert theirs is cls.get_new_blocks
    assert [RequestFreed(1)] == fake.events()


@probe()
def called(append):
    append(RequestFreed(1))


def hook(name):
    return Hook(f"{POOL}.{name}", called, emits="", without="", each_step=True)


@pytest.mark.parametrize("name", ["get_new_blocks", "of_size", "size_in_tokens"])
def test_who_kept_a_woven_function_has_the_original_s_code_when_it_is_off(fake, name):
    cls = fake.cls("BlockPool")
    code = getattr(cls, name).__code__
    done = fake.install(hook(name))
    assert is_woven(vars(cls)[name])
    kept = getattr(cls(4), name)
    assert code is not kept.__code__
    done.undo()
    assert code is kept.__code__
    assert kept(2)
    assert [] == fake.events()


def test_a_recorder_that_was_woven_in_can_go(folder):
    function = module_of(folder, "def function(x): return x").function
    recorder = Recorder(Options(dir=os.devnull))
    woven = copy_of(function, timed, recorder=recorder)
    recorder.state["a cycle"] = woven
    recorder.close()
    gone = weakref.ref(recorder)
    unweave(woven)
    del recorder
    gc.collect()
    assert gone() is None
    assert 3 == woven(3)


def test_unweave_leaves_alone_what_is_not_woven(folder):
    function = module_of(folder, "def function(x): return x").function
    wrapper = copy_of(function, Probe(timed.function), make=make_wrapper)
    for one in (function, wrapper, len, None):
        unweave(one)
    assert (1, 2) == (function(1), wrapper(2))
    assert function.__code__ is not wrapper.__code__

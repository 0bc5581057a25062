"""A module is hooked when somebody else imports it, and not a moment later."""

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_trace.errors import HookError
from vllm_trace.events import RequestFreed
from vllm_trace.hooks.arrivals import Arrivals
from vllm_trace.hooks.install import install
from vllm_trace.hooks.resolve import OK, Resolution
from vllm_trace.hooks.table import Hook, probe
from vllm_trace.options import Options
from vllm_trace.recorder import Recorder

NAMES = ("vtrace_a", "vtrace_b", "vtrace_c")


@probe()
def called(append, result):
    append(RequestFreed(result))


def row(name, **more):
    return Resolution(Hook(f"{name}:work", called, emits="", without="it is lost", **more), OK)


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """Makes modules that can be imported, each with a function ``work``; they are forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    finders = list(sys.meta_path)

    def make(**texts):
        for name in NAMES:
            text = texts.get(name, "def work(n):\n    return n\n")
            (tmp_path / f"{name}.py").write_text(text)
        importlib.invalidate_caches()
        forget()

    def forget():
        for name in NAMES:
            sys.modules.pop(name, None)

    make()
    make.forget = forget
    yield make
    forget()
    assert finders == sys.meta_path


@pytest.fixture
def made(tmp_path):
    recorder = Recorder(Options(dir=str(tmp_path / "trace")))
    yield recorder
    recorder.close()


def is_hooked(name):
    return hasattr(sys.modules[name].work, "__wrapped__")


def test_nothing_is_imported_only_to_be_hooked(modules, made):
    before = set(sys.modules)
    done = install([row("vtrace_a"), row("vtrace_b")], made)
    assert before == set(sys.modules)
    assert [] == done.placed
    import vtrace_a

    assert 5 == vtrace_a.work(5)
    assert [RequestFreed(5)] == made.pending
    assert "vtrace_b" not in sys.modules
    assert [] == done.undo()
    assert not is_hooked("vtrace_a")


def test_who_imports_a_function_by_name_has_the_hooked_one(modules, made):
    modules(vtrace_b="from vtrace_a import work\n")
    done = install([row("vtrace_a")], made)
    import vtrace_b

    vtrace_b.work(3)
    assert [RequestFreed(3)] == made.pending
    done.undo()


def test_the_module_has_its_own_loader(modules, made):
    import vtrace_b

    done = install([row("vtrace_a")], made)
    import vtrace_a

    assert type(vtrace_b.__loader__) is type(vtrace_a.__loader__)
    assert vtrace_a.__loader__ is vtrace_a.__spec__.loader
    assert "return n" in inspect.getsource(vtrace_a)
    done.undo()


def test_two_that_import_each_other_are_both_hooked(modules, made):
    each = "import {0}\ndef work(n):\n    return n\n"
    modules(vtrace_a=each.format("vtrace_b"), vtrace_b=each.format("vtrace_a"))
    done = install([row("vtrace_a", required=True), row("vtrace_b", required=True)], made)
    importlib.import_module("vtrace_a")

    assert is_hooked("vtrace_a") and is_hooked("vtrace_b")
    assert 2 == len(done.placed)
    done.undo()


def test_a_required_row_that_cannot_be_placed_takes_all_others_back(modules, made, capfd):
    modules(vtrace_b="work = len\n")
    install([row("vtrace_a"), row("vtrace_b", required=True), row("vtrace_c")], made)
    import vtrace_a
    import vtrace_b
    import vtrace_c

    assert len is vtrace_b.work
    assert not is_hooked("vtrace_a") and not is_hooked("vtrace_c")
    assert [1, 1] == [vtrace_a.work(1), vtrace_c.work(1)] and [] == made.pending
    (said,) = capfd.readouterr().err.splitlines()
    assert said.startswith("vllm-trace: not tracing: work cannot be hooked (vtrace_b:work is not")
    assert said.endswith("; required: it is lost). Nothing was changed.")


def test_strict_means_that_it_cannot_be_imported(modules, tmp_path, capfd):
    modules(vtrace_b="work = len\n")
    recorder = Recorder(Options(dir=str(tmp_path / "trace"), strict=True))
    install([row("vtrace_b", required=True)], recorder)
    with pytest.raises(HookError, match="work cannot be hooked"):
        importlib.import_module("vtrace_b")
    recorder.close()


def test_an_optional_row_that_cannot_be_placed_is_named_when_it_arrives(modules, made):
    modules(vtrace_b="work = len\n")
    done = install([row("vtrace_a"), row("vtrace_b")], made)
    told = []
    done.on_skipped = lambda row, reason: told.append((row.hook.target, reason))
    importlib.import_module("vtrace_a")
    importlib.import_module("vtrace_b")

    assert is_hooked("vtrace_a")
    ((target, reason),) = told
    assert "vtrace_b:work" == target and "is not a plain function" in reason
    done.undo()


def test_an_import_that_fails_is_as_without_us_and_may_succeed_later(modules, made):
    modules(vtrace_a="raise ImportError('no CUDA here')\n")
    done = install([row("vtrace_a")], made)
    with pytest.raises(ImportError, match="no CUDA here"):
        importlib.import_module("vtrace_a")
    assert {} == done.skipped
    modules()
    importlib.import_module("vtrace_a")
    assert is_hooked("vtrace_a")
    done.undo()


class Asking:
    """A finder that asks all others, as ours and those of other tools do."""

    def __init__(self):
        self.busy = False

    def find_spec(self, name, path, target=None):
        if self.busy or name not in NAMES:
            return None
        self.busy = True
        try:
            return importlib.util.find_spec(name)
        finally:
            self.busy = False


@pytest.mark.parametrize("first", [True, False])
def test_beside_another_finder_that_asks_all_it_is_told_once(modules, monkeypatch, first):
    told = []
    arrivals = Arrivals(["vtrace_a"], told.append)
    other = Asking()
    sys.meta_path.insert(0 if first else 1, other)
    import vtrace_a

    assert ["vtrace_a"] == told
    assert vtrace_a.__loader__ is vtrace_a.__spec__.loader
    assert "vllm_trace" not in type(vtrace_a.__loader__).__module__
    sys.meta_path.remove(other)
    arrivals.stop()
    arrivals.stop()


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    before=st.sets(st.sampled_from(NAMES)),
    after=st.permutations(NAMES).flatmap(
        lambda names: st.integers(0, len(names)).map(lambda n: names[:n])
    ),
)
def test_in_any_order_what_is_there_is_hooked_and_undone(modules, made, before, after):
    modules.forget()
    finders = list(sys.meta_path)
    for name in before:
        importlib.import_module(name)
    done = install([row(name) for name in NAMES], made)
    assert all(map(is_hooked, before))
    for name in after:
        importlib.import_module(name)
        assert is_hooked(name)
    assert before.union(after) == {placed.owner.__name__ for placed in done.placed}
    assert [] == done.undo()
    assert finders == sys.meta_path
    for name in NAMES:
        importlib.import_module(name)
        assert not is_hooked(name)


def test_a_forked_child_hooks_what_it_imports_itself(modules, tmp_path):
    code = """
import os, sys
sys.path[:0] = sys.argv[2:]
from vllm_trace.hooks.install import install
from test_arrivals import row
from vllm_trace.options import Options
from vllm_trace.recorder import Recorder
install([row("vtrace_a")], Recorder(Options(dir=sys.argv[1])))
if os.fork() == 0:
    import vtrace_a
    os._exit(hasattr(vtrace_a.work, "__wrapped__"))
assert os.waitstatus_to_exitcode(os.wait()[1]) == 1
assert "vtrace_a" not in sys.modules
"""
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", code, str(tmp_path / "trace"), str(tmp_path), here]
    subprocess.run(command, check=True, timeout=60)

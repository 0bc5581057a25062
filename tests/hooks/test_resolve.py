"""Every row gets a value before anything is touched; only then does anybody raise."""

import sys

import pytest
from fakes.engine import unpack

from vllm_trace.errors import HookError
from vllm_trace.events import BlocksTaken, PrefixCacheReset
from vllm_trace.hooks.resolve import choose, demand, resolve
from vllm_trace.hooks.source import VllmSource
from vllm_trace.hooks.table import Hook, HookTable, probe

POOL = "vllm.v1.core.block_pool:BlockPool"


@probe()
def taken(append, result, num_blocks):
    append(BlocksTaken(result))


@probe()
def reset(append, result):
    append(PrefixCacheReset(result))


def hook(target, a_probe=reset, **more):
    return Hook(target, a_probe, emits="", without=f"{target} is lost", **more)


def source(folder, *edits):
    return VllmSource.at(unpack(folder, *edits))


def states(rows):
    return [(row.hook.qualname, row.state, row.detail) for row in rows]


def test_each_row_is_ok_changed_incompatible_or_missing(tmp_path):
    reviewed = source(tmp_path / "reviewed").find(POOL.partition(":")[0], "BlockPool.free_blocks")
    changed = source(tmp_path / "changed", ("v1/core/block_pool.py", "ordered_blocks", "blocks"))
    table = HookTable(
        "==7.5.*",
        (
            hook(f"{POOL}.get_new_blocks", taken),
            hook(f"{POOL}.free_blocks", fingerprints=("0000", reviewed.fingerprint)),
            hook(f"{POOL}.of_size", taken),
            hook(f"{POOL}.free_blocks", probe(as_list=("ordered_blocks",))(reset.function)),
            hook(f"{POOL}.touch"),
            hook(f"{POOL}.reset"),
        ),
    )
    before = set(sys.modules)
    assert [
        ("BlockPool.get_new_blocks", "ok", ""),
        ("BlockPool.free_blocks", "changed", "source differs from the one reviewed"),
        ("BlockPool.of_size", "ok", ""),
        ("BlockPool.free_blocks", "incompatible", "no parameter ordered_blocks"),
        ("BlockPool.touch", "missing", f"no touch in {POOL}"),
        ("BlockPool.reset", "missing", "inherited from Base"),
    ] == states(resolve(table, changed))
    assert set() == {name for name in set(sys.modules) - before if name.startswith("vllm.")}


def test_any_reviewed_source_of_a_release_is_ok(tmp_path):
    found = source(tmp_path).find(POOL.partition(":")[0], "BlockPool.free_blocks").fingerprint
    table = HookTable("==7.5.*", (hook(f"{POOL}.free_blocks", fingerprints=("0000", found)),))
    assert ["ok"] == [row.state for row in resolve(table, VllmSource.at(tmp_path))]


def test_what_before_reads_must_be_there_too(tmp_path):
    def first(gone):
        return gone

    table = HookTable(
        "==7.5.*", (hook(f"{POOL}.free_blocks", probe(before=first)(reset.function)),)
    )
    assert [("BlockPool.free_blocks", "incompatible", "no parameter gone")] == states(
        resolve(table, source(tmp_path))
    )


def test_rows_of_another_platform_or_level_are_left_out(tmp_path):
    rows = (
        hook(f"{POOL}.get_new_blocks", taken, light=reset),
        hook(f"{POOL}.free_blocks", platform="cuda"),
        hook(f"{POOL}.of_size", platform="cpu", light=reset),
        hook(f"{POOL}.size_in_tokens"),
    )
    found, table = source(tmp_path), HookTable("==7.5.*", rows)

    def names(**asked):
        return [row.hook.qualname.partition(".")[2] for row in resolve(table, found, **asked)]

    assert ["get_new_blocks", "free_blocks", "of_size", "size_in_tokens"] == names()
    assert ["get_new_blocks", "of_size", "size_in_tokens"] == names(platform="cpu")
    assert ["get_new_blocks", "free_blocks", "size_in_tokens"] == names(platform="cuda")
    assert ["get_new_blocks", "of_size"] == names(platform="cpu", level="light")
    assert reset is resolve(table, found, level="light")[0].hook.probe


def test_a_row_prints_itself(tmp_path):
    rows = resolve(HookTable("==7.5.*", (hook(f"{POOL}.touch", required=True),)), source(tmp_path))
    assert [
        {
            "target": f"{POOL}.touch",
            "state": "missing",
            "detail": f"no touch in {POOL}",
            "emits": "",
            "required": True,
            "without": f"{POOL}.touch is lost",
        }
    ] == [row.to_dict() for row in rows]


# What is demanded -------------------------------------------------------------------------


def test_a_required_row_that_is_not_there_is_an_error_that_says_what_it_costs(tmp_path):
    rows = resolve(HookTable("==7.5.*", (hook(f"{POOL}.touch", required=True),)), source(tmp_path))
    with pytest.raises(HookError) as caught:
        demand(rows, "7.5.1")
    assert (
        f"vLLM 7.5.1: BlockPool.touch is missing (no touch in {POOL}; required: {POOL}.touch is lost)."
        " Nothing was changed."
    ) == str(caught.value)
    assert "Try: vllm-trace doctor" == caught.value.hint


def test_an_optional_row_may_be_missing_and_a_required_one_may_be_changed(tmp_path):
    rows = (
        hook(f"{POOL}.touch"),
        hook(f"{POOL}.free_blocks", required=True, fingerprints=("0000",)),
    )
    demand(resolve(HookTable("==7.5.*", rows), source(tmp_path)), "7.5.1")


def test_strict_demands_the_reviewed_source_of_every_row(tmp_path):
    rows = resolve(
        HookTable("==7.5.*", (hook(f"{POOL}.free_blocks", fingerprints=("0000",)),)),
        source(tmp_path),
    )
    with pytest.raises(HookError, match="free_blocks is not the reviewed source"):
        demand(rows, "7.5.1", strict=True)


# Which table ------------------------------------------------------------------------------

TABLES = (HookTable(">=7.4,<7.5", ()), HookTable(">=7.5,<7.6", ()))


@pytest.mark.parametrize(
    ("version", "index"),
    [
        ("7.4.0", 0),
        ("7.5.0", 1),
        ("7.5.3+cpu", 1),
        ("7.5.1.dev3+g12ab", 1),
        ("7.5.0rc1", 1),
        ("7.4.9", 0),
    ],
)
def test_a_release_has_the_table_of_its_minor_version(version, index):
    assert TABLES[index] is choose(TABLES, version)


@pytest.mark.parametrize(
    ("version", "named"), [("7.6.0", "7.6.0"), ("8", "8"), ("", "(no version)"), ("dev", "dev")]
)
def test_a_release_without_a_table_is_an_error_that_names_those_that_have_one(version, named):
    with pytest.raises(HookError) as caught:
        choose(TABLES, version)
    assert f"vLLM {named}: no hook table for this release; nothing was changed" == str(caught.value)
    assert "Known: >=7.4,<7.5; >=7.5,<7.6. Try: vllm-trace doctor --source DIR" == caught.value.hint

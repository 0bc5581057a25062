"""The table of 0.20 on its source, which is read and not imported."""

import pytest

from vllm_trace.hooks.resolve import resolve
from vllm_trace.options import LEVELS
from vllm_trace.patches import v0_20, v0_32


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
@pytest.mark.parametrize("level", LEVELS)
def test_every_row_is_the_source_that_was_reviewed(source_0_20, platform, level):
    rows = resolve(v0_20.TABLE, source_0_20, level=level, platform=platform)
    assert [] == [row.to_dict() for row in rows if row.state != "ok"]
    assert len(rows) > 5


def test_what_the_table_of_0_32_lacks_there_is_what_this_one_has_instead(source_0_20):
    rows = resolve(v0_32.TABLE, source_0_20)
    missing = {row.hook.target for row in rows if row.state == "missing"}
    assert {"vllm.v1.core.block_pool:BlockPool._remove_cached_block_hashes"} == missing
    assert "vllm.v1.core.block_pool:BlockPool._maybe_evict_cached_block" in v0_20.FINGERPRINTS


def test_it_has_every_row_of_0_32_or_its_other_name():
    ours = {hook.target for hook in v0_20.TABLE.hooks}
    theirs = {hook.target for hook in v0_32.TABLE.hooks}
    assert {"vllm.v1.core.block_pool:BlockPool._remove_cached_block_hashes"} == theirs - ours
    assert {
        "vllm.v1.core.block_pool:BlockPool._maybe_evict_cached_block",
        "vllm.platforms.cuda:CudaPlatformBase.get_attn_backend_cls",
    } == ours - theirs

"""The table of 0.33 on its source, which is read and not imported."""

import pytest

from vllm_trace.hooks.resolve import resolve
from vllm_trace.options import LEVELS
from vllm_trace.patches import v0_32, v0_33


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
@pytest.mark.parametrize("level", LEVELS)
def test_every_row_is_the_source_that_was_reviewed(source_0_33, platform, level):
    rows = resolve(v0_33.TABLE, source_0_33, level=level, platform=platform)
    assert [] == [row.to_dict() for row in rows if row.state != "ok"]
    assert len(rows) > 5


def test_the_table_of_0_32_would_see_what_changed(source_0_33):
    """Its rows are there and can be hooked; the functions that were rewritten are ``changed``."""
    rows = resolve(v0_32.TABLE, source_0_33)
    changed = {row.hook.target for row in rows if row.state == "changed"}
    assert {"ok", "changed"} == {row.state for row in rows}
    assert {
        t for t, text in v0_33.FINGERPRINTS.items() if v0_32.FINGERPRINTS.get(t) != text
    } == changed
    assert "vllm.v1.core.kv_cache_manager:KVCacheManager.get_computed_blocks" in changed

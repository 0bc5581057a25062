"""The table of 0.20 on its source, which is read and not imported."""

from types import SimpleNamespace

import pytest

from vllm_trace.events import RequestSeen, SlotsRefused
from vllm_trace.hooks.resolve import resolve
from vllm_trace.hooks.wrap import make_wrapper
from vllm_trace.options import LEVELS, Options
from vllm_trace.patches import block_probes as s
from vllm_trace.patches import v0_20, v0_32
from vllm_trace.recorder import Recorder


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
        "vllm.v1.core.kv_cache_manager:KVCacheManager.can_fit_full_sequence",
    } == ours - theirs


class Manager:
    """0.20.2 ``v1/core/kv_cache_manager.py``: three free blocks of 16 tokens."""

    max_model_len = 128
    empty_kv_cache_blocks = SimpleNamespace(blocks=((),))
    block_pool = SimpleNamespace(free_block_queue=SimpleNamespace(num_free_blocks=3))

    class coordinator:
        @staticmethod
        def get_num_blocks_to_allocate(
            request_id,
            num_tokens,
            new_computed_blocks,
            num_encoder_tokens,
            total_computed_tokens,
            num_tokens_main_model,
            apply_admission_cap=False,
        ):
            return -(-num_tokens // 16) - len(new_computed_blocks[0])

    def can_fit_full_sequence(
        self,
        request,
        num_new_computed_tokens=0,
        new_computed_blocks=None,
        num_external_computed_tokens=0,
        num_encoder_tokens=0,
    ):
        return request.num_tokens <= 48 + num_new_computed_tokens


def test_who_does_not_fit_as_a_whole_is_refused_the_rest_of_its_sequence(tmp_path):
    recorder = Recorder(Options(dir=str(tmp_path)))
    fits = make_wrapper(
        Manager.can_fit_full_sequence, s.can_fit_full_sequence,
        recorder=recorder, failed=pytest.fail, clock=lambda: 0,
    )  # fmt: skip
    long, short = (
        SimpleNamespace(
            request_id=f"r{n}", num_tokens=n, num_prompt_tokens=n, num_computed_tokens=0
        )
        for n in (70, 40)
    )
    hits = SimpleNamespace(blocks=([SimpleNamespace()],))
    assert not fits(Manager(), long, num_new_computed_tokens=16, new_computed_blocks=hits)
    assert not fits(Manager(), long)
    assert fits(Manager(), short)
    told = [event for event in recorder.pending if type(event) is not RequestSeen]
    recorder.close()
    # Five blocks for 70 tokens, one of them hit.
    assert [SlotsRefused(0, 54, 16, 3, 0, 4), SlotsRefused(0, 70, 0, 3, 0, 5)] == told

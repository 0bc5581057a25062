"""Where ``allocate_slots`` sleeps, the trace is what it would be if it were watched."""

from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_trace.events import SlotsAllocated
from vllm_trace.trace import read_trace

from .conftest import hypothesis_settings
from .test_trace_replay import BLOCK_SIZE, GROUPS, MAX_MODEL_LEN, Workload

TIMES = ("at_ns", "started_ns", "dur_ns", "arrival_unix")


def events_of(real, folder, watched, seed, spare, async_scheduling, enable_caching):
    """A random workload's events but for their times, and how often the hook fell asleep."""
    from vllm_trace import hooks
    from vllm_trace.options import Options
    from vllm_trace.patches import step_probes
    from vllm_trace.recorder import Recorder

    naps, set_quiet = [], Recorder.set_quiet

    def noted(recorder, quiet):
        naps.append(quiet)
        set_quiet(recorder, quiet)

    grows = step_probes.grows_by_one_block
    with (
        mock.patch.object(step_probes, "grows_by_one_block", lambda s: not watched and grows(s)),
        mock.patch.object(Recorder, "set_quiet", noted),
    ):
        hooks.attach(Options(dir=str(folder / "trace")))
        try:
            Workload(
                real,
                folder,
                GROUPS["full"],
                -(-MAX_MODEL_LEN // BLOCK_SIZE) + 2 + spare,
                seed,
                enable_caching,
                max_num_batched_tokens=33,
                max_num_seqs=8,
                policy="fcfs",
                async_scheduling=async_scheduling,
                long_prefill_token_threshold=0,
                enable_chunked_prefill=True,
            ).run(40)
        finally:
            hooks.detach()
    events: list = []
    for event in read_trace(folder / "trace").events():
        fields = {name: getattr(event, name) for name in event.__struct_fields__}
        fields.pop("settings", None)  # they name the folder
        events.append((event.kind, {k: v for k, v in fields.items() if k not in TIMES}))
    return events, sum(naps)


def check_both(real, make_folder, **workload):
    watched, never = events_of(real, make_folder("watched"), True, **workload)
    asleep, naps = events_of(real, make_folder("asleep"), False, **workload)
    assert never == 0
    assert watched == asleep
    return asleep, naps


@pytest.mark.slow
def test_a_hook_that_sleeps_misses_nothing(real, tmp_path_factory):
    naps = []

    @hypothesis_settings(10)
    @given(
        seed=st.integers(0, 2**32 - 1),
        spare=st.sampled_from([3, 30, 60]),
        async_scheduling=st.booleans(),
        enable_caching=st.booleans(),
    )
    def check(**workload):
        naps.append(check_both(real, tmp_path_factory.mktemp, **workload)[1])

    check()
    assert sum(naps) > 10


@pytest.mark.parametrize("taken", [True, False])
def test_a_block_that_is_not_the_one_taken_is_told_as_it_is(
    real, tmp_path_factory, monkeypatch, taken
):
    """Each decode step hands out the null block instead: as corrupt as it gets, and the trace must say so."""
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager

    allocate = SingleTypeKVCacheManager.allocate_new_blocks

    def faulty(self, request_id, num_tokens, *args, **kwargs):
        held, null = self.req_to_blocks[request_id], self.block_pool.null_block
        if not held or -(-num_tokens // self.block_size) != len(held) + 1:
            return allocate(self, request_id, num_tokens, *args, **kwargs)
        if taken:
            self.block_pool.get_new_blocks(1)
        held.append(null)
        return [null]

    monkeypatch.setattr(SingleTypeKVCacheManager, "allocate_new_blocks", faulty)
    monkeypatch.setattr(BlockPool, "cache_full_blocks", lambda *args, **kwargs: None)
    config = dict(seed=7, spare=60, async_scheduling=False, enable_caching=False)
    watched, _ = events_of(real, tmp_path_factory.mktemp("watched"), True, **config)
    asleep, naps = events_of(real, tmp_path_factory.mktemp("asleep"), False, **config)

    def told(events):
        mine = [fields for kind, fields in events if kind == SlotsAllocated.kind]
        return [(fields["request"], fields["blocks"]) for fields in mine]

    assert naps
    assert [[0]] in [blocks for _, blocks in told(asleep)]
    assert told(watched) == told(asleep)

"""What a sound engine does breaks no invariant: every scenario, a hybrid model, KV events on."""

import pytest

from vllm_trace import scenario
from vllm_trace.invariants import check
from vllm_trace.invariants.registry import choose

BUILT_IN = [one.id for one in choose() if one.built_in]


def broken(report):
    return [f"{v.invariant} at event {v.event_number}: {v.message}" for v in report.violations]


@pytest.mark.parametrize("name", scenario.names())
def test_every_scenario_satisfies_all_invariants(traces, name):
    report = check(traces(name), BUILT_IN)
    assert [] == broken(report)
    assert "clean" == report.verdict
    assert ["kv-events"] == [each.invariant.id for each in report.of("unjudged")]
    assert len(BUILT_IN) - 1 == len(report.of("holds"))
    assert report.num_events == sum(1 for _ in traces(name).records()) > 90


@pytest.mark.parametrize("name", ["evict", "preempt"])
def test_our_events_are_vllms_own_kv_events(traces, name):
    from vllm.config import KVEventsConfig

    config = KVEventsConfig(enable_kv_cache_events=True, publisher="null")
    trace = traces(name, kv_events_config=config)
    report = check(trace, BUILT_IN)
    assert [] == broken(report)
    assert len(BUILT_IN) == len(report.of("holds"))
    taken = [what for e in trace.events() if e.kind == "kv_events.taken" for what, _ in e.events]
    assert {"stored", "removed"} == set(taken)


def test_windows_and_several_groups_give_no_false_alarm(traces, hybrid_scenario):
    trace = traces(hybrid_scenario)
    report = check(trace, BUILT_IN)
    assert [] == broken(report)
    assert "clean" == report.verdict
    seen = {event.kind for event in trace.events()}
    assert {"block.evicted", "slots.refused", "blocks.touched", "request.preempted"} <= seen
    config = next(e for e in trace.events() if e.kind == "engine.configured")
    assert 3 == len(config.groups) and 2 == sum(g.sliding_window == 64 for g in config.groups)


def test_without_prefix_caching_what_is_about_hashes_is_not_judged(traces):
    report = check(traces("preempt", enable_prefix_caching=False), BUILT_IN)
    assert [] == broken(report)
    assert "clean" == report.verdict
    assert ["hit-cached", "hash-chain", "kv-events"] == [
        each.invariant.id for each in report.of("unjudged")
    ]
    assert {"prefix caching is off", "vLLM's own KV events are off"} == {
        each.reason for each in report.of("unjudged")
    }

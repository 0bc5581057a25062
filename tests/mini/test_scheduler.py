"""Scheduler without vLLM: whole schedules of small cases, with requests that have no token ids."""

import pytest

from vllm_trace.mini.kv_cache_manager import FullAttentionSpec, KVCacheManager
from vllm_trace.mini.request import Request
from vllm_trace.mini.rules import rules_for
from vllm_trace.mini.scheduler import Scheduler, SchedulerConfig


def make(num_blocks=20, release="0.32.0", **config):
    told = []
    manager = KVCacheManager(
        num_blocks, [FullAttentionSpec(4)], 64, rules=rules_for(release), tell=told.append
    )
    return Scheduler(manager, SchedulerConfig(**config), told.append), told


def add(scheduler, name, num_tokens, max_tokens=8, **options):
    hashes = [f"{name}{i}" for i in range(16)]  # more than are full: only the full ones are used
    scheduler.add_request(
        Request(
            name,
            num_prompt_tokens=num_tokens,
            max_tokens=max_tokens,
            block_hashes=hashes,
            **options,
        )
    )


def step(scheduler, **update):
    output = scheduler.schedule()
    sampled = {
        name: 1
        for name, num_tokens in output.num_scheduled_tokens.items()
        if output.num_computed_tokens[name] + num_tokens >= scheduler.requests[name].num_tokens
    }
    scheduler.update_from_output(output, sampled, **update)
    return output.num_scheduled_tokens


def test_chunked_prefill_fills_the_budget():
    scheduler, _ = make(max_num_batched_tokens=8)
    add(scheduler, "a", 10)
    add(scheduler, "b", 5)
    assert [step(scheduler) for _ in range(3)] == [{"a": 8}, {"a": 2, "b": 5}, {"a": 1, "b": 1}]


def test_without_chunked_prefill_a_long_prompt_waits_for_room():
    scheduler, _ = make(max_num_batched_tokens=8, enable_chunked_prefill=False)
    add(scheduler, "a", 6)
    add(scheduler, "b", 5)
    assert [step(scheduler) for _ in range(2)] == [{"a": 6}, {"a": 1, "b": 5}]


def test_a_threshold_cuts_long_prompts_unless_alone():
    for release, first in {"0.32.0": {"a": 10}, "0.20.2": {"a": 4}}.items():
        scheduler, _ = make(long_prefill_token_threshold=4, release=release)
        add(scheduler, "a", 10)
        assert step(scheduler) == first


def test_preemption_takes_the_last_and_computes_it_again():
    scheduler, told = make(num_blocks=6, scheduler_reserve_full_isl=False)
    add(scheduler, "a", 8)
    add(scheduler, "b", 8)
    assert step(scheduler) == {"a": 8, "b": 8}
    told.clear()
    assert step(scheduler) == {"a": 1}
    assert told == [
        ("blocks.taken", [5]),
        ("slots.allocated", "a", 1, 0, [[5]], 0),
        ("slots.refused", "b", 1, 0, 0, 1),
        ("blocks.freed", [4, 3], [0, 0]),
        ("request.freed", "b"),
        ("request.preempted", "b", 8, 2),
        ("step.scheduled", 2, ["a"], [1]),
    ]
    told.clear()
    # b would hit both of its blocks, but they are the only free ones and it needs a third.
    assert step(scheduler) == {"a": 1}
    assert told == [
        ("prefix.looked_up", "b", 9, 8, [[3, 4]]),
        ("slots.refused", "b", 1, 8, 2, 3),
        ("step.scheduled", 3, ["a"], [1]),
    ]


def test_priority_lets_the_least_important_go():
    scheduler, _ = make(num_blocks=6, policy="priority", scheduler_reserve_full_isl=False)
    add(scheduler, "low", 8, priority=5, arrival_time=1.0)
    assert step(scheduler) == {"low": 8}
    add(scheduler, "high", 8, priority=1, arrival_time=2.0)
    output = scheduler.schedule()
    assert output.num_scheduled_tokens == {"low": 1, "high": 8}
    scheduler.update_from_output(output, {"low": 1, "high": 1})
    output = scheduler.schedule()
    assert (output.num_scheduled_tokens, output.preempted_req_ids) == ({"high": 1}, ["low"])


def test_abort_gives_everything_back_and_is_reported_once():
    scheduler, told = make()
    add(scheduler, "a", 10)
    step(scheduler)
    scheduler.finish_requests(["a", "nobody"])
    scheduler.finish_requests(["a"])
    assert told[-2:] == [("request.freed", "a"), ("request.finished", "a", "abort", 1, 0)]
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == 19
    assert scheduler.schedule().finished_req_ids == ["a"]
    assert not scheduler.has_requests()


@pytest.mark.parametrize(
    "options, sampled, reason",
    [({}, [3, 9, 4], "stop"), ({}, [2], "stop"), ({"max_tokens": 2}, [1, 1, 1], "length")],
)
def test_stops(options, sampled, reason):
    scheduler, _ = make()
    scheduler.add_request(
        Request(
            "a",
            [1] * 6,
            block_hashes=range(9),
            eos_token_id=2,
            stop_token_ids=[9],
            **{"max_tokens": 8, **options},
        )
    )
    assert scheduler.update_from_output(scheduler.schedule(), {"a": sampled}) == {"a": reason}


def test_a_trace_without_token_ids_says_who_stopped():
    scheduler, told = make()
    add(scheduler, "a", 6)
    step(scheduler, stops={"a": "stop"})
    assert told[-1] == ("request.finished", "a", "stop", 1, 0)


def test_async_plans_a_step_before_the_last_is_answered():
    scheduler, _ = make(async_scheduling=True)
    add(scheduler, "a", 6, max_tokens=3)
    first = scheduler.schedule()
    second = scheduler.schedule()
    assert (first.num_scheduled_tokens, second.num_scheduled_tokens) == ({"a": 6}, {"a": 1})
    assert scheduler.requests["a"].num_output_placeholders == 2
    scheduler.update_from_output(first, {"a": 1})
    third = scheduler.schedule()
    scheduler.update_from_output(second, {"a": 1})
    assert scheduler.schedule().num_scheduled_tokens == {}  # the third answer will be the last one
    assert scheduler.update_from_output(third, {"a": 1}) == {"a": "length"}


def test_async_victims_wait_for_their_answers_and_keep_their_order():
    scheduler, _ = make(num_blocks=10, async_scheduling=True, scheduler_reserve_full_isl=False)
    for name in "abc":
        add(scheduler, name, 8)
    add(scheduler, "d", 40)
    first = scheduler.schedule()
    second = scheduler.schedule()
    scheduler.finish_requests(["d"])
    for victim in "cb":
        request = scheduler.requests[victim]
        scheduler.running.remove(request)
        scheduler._preempt_request(request)
    assert scheduler.schedule().num_scheduled_tokens == {"a": 1}
    assert [request.request_id for request in scheduler.waiting] == ["b", "c"]
    scheduler.update_from_output(first, dict.fromkeys("abc", 1))
    scheduler.update_from_output(second, dict.fromkeys("abc", 1))
    assert list(scheduler.schedule().num_scheduled_tokens) == ["a", "b", "c"]


def test_unknown_policy_and_second_arrival_are_errors():
    with pytest.raises(ValueError, match="fcfs or priority"):
        SchedulerConfig(policy="random")
    scheduler, _ = make()
    add(scheduler, "a", 4)
    with pytest.raises(ValueError, match="'a' is already here"):
        add(scheduler, "a", 4)

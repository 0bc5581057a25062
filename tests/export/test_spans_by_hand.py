"""The fold: each rule on events made by hand, cut anywhere, and of several processes in any order."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import recorded
from helpers import write_trace
from hypothesis import given
from hypothesis import strategies as st

from export.span_trees import CLIENT, assert_trees, children, one_request, roots
from vllm_trace.events import (
    EVENT_TYPES,
    AttentionCalled,
    AttentionPlanned,
    BlockEvicted,
    PrefixLookedUp,
    RequestFinished,
    RequestPreempted,
    RequestSeen,
    StepExecuted,
    StepSampled,
    StepScheduled,
    StepUpdated,
)
from vllm_trace.export import attributes as a
from vllm_trace.export.prefix import PrefixHistory
from vllm_trace.export.span import Span, hashed, read_traceparent
from vllm_trace.export.spans import SpanFold, spans
from vllm_trace.trace import read_trace

GOLD = Path(__file__).resolve().parent.parent / "gold"
WORKER_EVENTS = (StepExecuted, StepSampled, AttentionPlanned, AttentionCalled)


# By hand ----------------------------------------------------------------------------------


def by_hand(folder: Path, events: list[Any], options: Any = None, **header: Any) -> list[Span]:
    path = recorded.written(folder, events, **header)
    return list(spans(read_trace(path), SpanFold(**(options or {}))))


def test_the_clients_trace_is_continued(tmp_path):
    (root,) = roots(by_hand(tmp_path, one_request(traceparent=CLIENT))).values()
    assert "0af7651916cd43dd8448eb211c80319c" == root.trace_id.hex()
    assert ("b7ad6b7169203331", True) == (root.parent_id.hex(), root.remote_parent)
    assert a.BAD_TRACEPARENT not in root.attributes


@pytest.mark.parametrize(
    "header",
    [
        "00-00000000000000000000000000000000-b7ad6b7169203331-01",
        "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
        "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more",
        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331",
        "nonsense",
        "\x00" * 55,
    ],
)
def test_an_id_that_is_none_is_replaced_and_marked(header, tmp_path):
    found = by_hand(tmp_path, one_request(traceparent=header))
    (root,) = roots(found).values()
    assert root.attributes[a.BAD_TRACEPARENT] and not root.parent_id
    assert_trees(found)


def test_a_later_version_of_traceparent_is_read_as_far_as_it_is_known():
    assert read_traceparent(CLIENT.replace("00-", "01-", 1) + "-more").sampled
    assert not read_traceparent(CLIENT[:-2] + "02").sampled


def test_a_client_that_does_not_sample_is_respected(tmp_path):
    from vllm_trace.export.endpoint import sampler_of

    events = one_request(traceparent=CLIENT[:-1] + "0")
    fold = SpanFold(sampler_of({}))
    found = list(spans(read_trace(recorded.written(tmp_path, events)), fold))
    assert (0, 1, 1) == (len(roots(found)), fold.num_requests, fold.num_unsampled)
    assert 2 == sum(one.name == "engine_step" for one in found)
    fold = SpanFold(sampler_of({"OTEL_TRACES_SAMPLER": "always_on"}))
    assert 1 == len(roots(list(spans(read_trace(tmp_path), fold))))


def test_token_ids_only_when_recorded_and_asked_for(tmp_path):
    events = one_request(token_ids=[3, 1, 4, 1, 5, 9])
    (root,) = roots(by_hand(tmp_path / "a", events)).values()
    assert a.PROMPT_TOKEN_IDS not in root.attributes and a.OUTPUT_TOKEN_IDS not in root.attributes
    (root,) = roots(by_hand(tmp_path / "b", events, {"tokens": True})).values()
    assert (3, 1, 4, 1, 5, 9) == root.attributes[a.PROMPT_TOKEN_IDS]
    assert (7, 8) == root.attributes[a.OUTPUT_TOKEN_IDS]


def test_rare_facts_of_an_arrival(tmp_path):
    events = one_request(lora="poet", salted=True)
    events[1].priority = 3
    events[1].sampling = {"n": 2, "seed": 7, "top_k": 5, "top_p": 1, "temperature": 0}
    (root,) = roots(by_hand(tmp_path, events)).values()
    assert {
        a.LORA: "poet", a.SALTED: True, a.PRIORITY: 3, a.CHOICES: 2, a.SEED: 7, a.TOP_K: 5,
        a.TOP_P: 1.0, a.TEMPERATURE: 0.0,
    }.items() <= root.attributes.items()  # fmt: skip


def test_spec_decode_counts_its_tokens(tmp_path):
    """Those that a step computes, and those that came of it; the second step is as the one before."""
    events = one_request()
    events[-5:-3] = [
        recorded.step(2, [0], [4]), recorded.updated(2, [[8, 9, 10]]),
        recorded.step(3, [0], [4]), recorded.updated(3, [[11]]),
    ]  # fmt: skip
    events[-1].at_ns, events[-1].num_output_tokens = 36, 5
    found = by_hand(tmp_path, events)
    (root,) = roots(found).values()
    (decode,) = children(found, root, "decode")
    assert [3, 1] == [event.attributes[a.NUM_OUTPUT] for event in decode.events]
    assert 4 == decode.attributes[a.NUM_OUTPUT]
    steps = sorted((s for s in found if s.name == "engine_step"), key=lambda s: s.start_ns)
    assert [0, 4, 4] == [step.attributes.get(a.DECODE_TOKENS, 0) for step in steps]


def test_a_long_decode_is_several_spans_and_the_log_stays_short(tmp_path):
    events = one_request()
    end = events[-3:]
    more = []
    for number in range(3, 100):
        more += [recorded.step(number, [0], [1]), recorded.updated(number, [[5]])]
    end[-1].at_ns, end[-1].num_output_tokens = 1000, 100
    fold = SpanFold(max_steps=16)
    longest = 0
    process = fold.open({"role": "main", "level": "full"})
    found = []
    for event in events[:-3] + more + end:
        fold.feed(process, [event])
        found += fold.take()
        longest = max(longest, len(fold.engines[0].decodes.log.events))
    fold.end()
    found += fold.take()
    assert_trees(found)
    (root,) = roots(found).values()
    decodes = children(found, root, "decode")
    assert all(1 <= len(one.events) <= 16 for one in decodes)
    assert [*range(2, 100)] == [e.attributes[a.STEP] for one in decodes for e in one.events]
    assert longest <= 17
    assert not fold.engines[0].steps.open and not fold.engines[0].lives


def test_async_scheduling_ends_a_request_with_a_step_in_flight(tmp_path):
    """Step 3 is scheduled before the results of step 2 end the request."""
    events = one_request()
    begin, tail = events[:-5], events[-3:]
    tail[-1].at_ns = 36
    late = [recorded.step(2, [0], [1]), recorded.step(3, [0], [1])]
    late[1].started_ns = 22
    first, last = recorded.updated(2, [[8]]), recorded.updated(3, [[9]])
    first.started_ns, last.started_ns = 35, 45
    found = by_hand(tmp_path, begin + late + tail + [first, last])
    assert_trees(found)
    (root,) = roots(found).values()
    (decode,) = children(found, root, "decode")
    assert [(2, 1), (3, 0)] == [
        (event.attributes[a.STEP], event.attributes[a.NUM_OUTPUT]) for event in decode.events
    ]
    assert 2 == root.attributes[a.OUTPUT_TOKENS]


def test_level_light_exports_what_it_has(tmp_path):
    events = [
        event for event in one_request()
        if event.kind.startswith(("request.arr", "request.fin", "step", "engine"))
    ]  # fmt: skip
    for event in events:
        if isinstance(event, StepUpdated):
            event.num_output_tokens = event.token_ids = None
    found = by_hand(tmp_path, events, level="light")
    assert_trees(found)
    (root,) = roots(found).values()
    names = [one.name for one in children(found, root)]
    assert ["queued", "schedule", "prefill", "decode"] == names
    (decode,) = children(found, root, "decode")
    assert a.NUM_OUTPUT not in decode.attributes and 1 == decode.attributes[a.NUM_STEPS]
    assert root.attributes[a.TTFT_NS] > 0 and a.NUM_REFUSALS not in root.attributes


def test_an_empty_trace_has_no_spans(tmp_path):
    assert [] == by_hand(tmp_path, [recorded.engine()])


def test_a_trace_that_begins_late_is_marked(tmp_path):
    found = by_hand(tmp_path, one_request()[5:])
    assert_trees(found)
    (root,) = roots(found).values()
    assert root.attributes[a.INCOMPLETE] and "#0" == root.attributes[a.REQUEST_ID]


def test_a_trace_of_a_worker_alone(tmp_path):
    worked = [StepExecuted(4, 10, 5, 11, 3, 1, 8, 8, "eager"), StepSampled(4, 16, 2, 1)]
    write_trace(tmp_path, "worker", 9, [worked], rank=1)
    found = list(spans(read_trace(tmp_path)))
    assert_trees(found)
    assert ["execute", "forward", "sample", "engine_step"] == [one.name for one in found]
    assert found[-1].attributes[a.INCOMPLETE] and 1 == found[0].attributes[a.RANK]


@pytest.mark.parametrize("name", ["preempt", "prefix", "abort"])
def test_cut_anywhere_what_is_open_is_exported_and_marked(name):
    events = list(read_trace(GOLD / f"{name}.vtrace").events())
    rng = random.Random(4)
    for cut in sorted(rng.sample(range(3, len(events)), 25)):
        # Fresh events each time: a reading keeps lists that steps share.
        kept = list(read_trace(GOLD / f"{name}.vtrace").events())[:cut]
        fold = SpanFold()
        fold.feed(fold.open({"role": "main", "level": "full"}), kept)
        fold.end()
        found = fold.take()
        assert_trees(found)
        arrived = {event.request_id for event in kept if event.kind == "request.arrived"}
        finished = {
            event.request for event in kept if isinstance(event, RequestFinished)
        }  # fmt: skip
        by_name = roots(found)
        assert arrived == by_name.keys()
        whole = [one for one in by_name.values() if a.INCOMPLETE not in one.attributes]
        assert len(finished) == len(whole)
        open_ones = [one for one in by_name.values() if a.INCOMPLETE in one.attributes]
        assert all("trace_ended" in [e.name for e in one.events] for one in open_ones)


# Several processes ------------------------------------------------------------------------


def apart(name: str) -> tuple[list[list[Any]], list[list[Any]]]:
    """A golden trace as EngineCore and a worker would have written it: batches of both."""
    engine: list[list[Any]] = [[]]
    worker: list[list[Any]] = [[]]
    for event in read_trace(GOLD / f"{name}.vtrace").events():
        if isinstance(event, WORKER_EVENTS) or event.kind == "backend.selected":
            worker[-1].append(event)
            if isinstance(event, StepSampled):
                worker.append([])
        elif event.kind not in ("slots.mapped", "table.changed"):
            engine[-1].append(event)
            if isinstance(event, StepUpdated):
                engine.append([])
    return engine, worker


def told(found: list[Span]) -> Counter[str]:
    """Spans as text, without the process that told them."""
    return Counter(
        repr((s.trace_id, s.span_id, s.parent_id, s.name, s.start_ns, s.end_ns, s.attributes, s.error,
              [(e.at_ns, e.name, e.attributes) for e in s.events], s.links))
        for s in found
    )  # fmt: skip


HEADER = {"role": "engine", "pid": 1, "host": "here", "level": "full"}


@given(st.data())
def test_processes_may_be_read_in_any_order_within_the_lag(data):
    engine, worker = apart("chunked")
    fold = SpanFold(lag=8)
    first, second = fold.open(HEADER), fold.open(HEADER | {"role": "worker", "pid": 2})
    ahead = 0
    while engine or worker:
        may_engine = engine and (ahead < 6 or not worker)
        may_worker = worker and (ahead > -6 or not engine)
        if may_engine and (not may_worker or data.draw(st.booleans())):
            fold.feed(first, engine.pop(0))
            ahead += 1
        else:
            fold.feed(second, worker.pop(0))
            ahead -= 1
    fold.end()
    alone = SpanFold()
    alone.feed(alone.open(HEADER), list(read_trace(GOLD / "chunked.vtrace").events()))
    alone.end()
    assert told(alone.take()) == told(fold.take())
    assert 0 == fold.num_late


def test_two_engines_and_their_workers_are_told_apart(tmp_path):
    """Data parallel: both have a step 1; a worker belongs to whose request it has seen."""
    for place, name in enumerate(("left", "right")):
        events = one_request()
        events[1].request_id = name
        write_trace(tmp_path, "engine", 10 + place, [events], rank=place)
        seen = [RequestSeen(0, name), StepExecuted(1, 12, 2, 13, 1, place, 6, 6, "eager")]
        write_trace(tmp_path, "worker", 20 + place, [seen], rank=place)
    found = list(spans(read_trace(tmp_path)))
    assert_trees(found)
    for place, name in enumerate(("left", "right")):
        root = roots(found)[name]
        (link,) = children(found, root, "prefill")[0].links
        ranks = [
            s.attributes[a.RANK]
            for s in found
            if s.trace_id == link.trace_id and s.name == "execute"
        ]
        assert [place] == ranks
        assert 10 + place == root.resource.attributes[a.PROCESS_PID]


def test_the_history_of_hashes_is_bounded_and_says_when_it_forgot():
    history = PrefixHistory(remembered=2)
    history.configured(recorded.engine(block_size=4))
    from vllm_trace.events import BlocksCached

    for number in range(5):
        history.blocks_cached(BlocksCached(0, 0, 0, [number + 1], [100 + number]))
        history.block_evicted(BlockEvicted(number + 1, [100 + number]))
        history.took(9)
    assert 1 <= history.num_lost == len(history.seen) <= 2
    for block_hash, cause, taker in ((100, "unknown", -1), (104, "evicted", 9)):
        history.hashes.clear()
        lookup = history.looked_up(PrefixLookedUp(1, 9, 0, [[]], [block_hash, 7]))
        history.judge()
        assert (cause, taker) == (lookup.miss.cause, lookup.miss.taker)


def test_every_kind_of_event_is_one_that_the_fold_takes_or_leaves_out():
    """A new kind has to be thought about: it stands in one of the two lists."""
    from vllm_trace.export import spans as module

    taken = {*module._ENGINE, *module._WORKER, module.EngineConfigured}
    left_out = {
        "blocks.taken", "blocks.touched", "table.changed", "slots.mapped", "probe.failed",
        "kv_events.taken", "engine.stopped", "backend.selected", "request.seen",
    }  # fmt: skip
    assert {kind.kind for kind in EVENT_TYPES} == {kind.kind for kind in taken} | left_out
    assert hashed("x") != hashed("y") and RequestPreempted in taken and StepScheduled in taken

"""The fold: golden traces as spans with the summary's numbers."""

from __future__ import annotations

from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from export.span_trees import assert_trees, children, roots
from vllm_trace.events import BlocksFreed, PrefixLookedUp, RequestFreed, SlotsAllocated
from vllm_trace.explain.cache import CAUSES, HashBook
from vllm_trace.export import attributes as a
from vllm_trace.export.prefix import PrefixHistory
from vllm_trace.export.span import Span
from vllm_trace.export.spans import SpanFold, spans
from vllm_trace.state import KVState
from vllm_trace.summary import Summary
from vllm_trace.trace import read_trace

GOLD = Path(__file__).resolve().parent.parent / "gold"
TRACES = sorted(path.stem for path in GOLD.glob("*.vtrace"))


def made(name: str, **options: Any) -> list[Span]:
    return list(spans(read_trace(GOLD / f"{name}.vtrace"), SpanFold(**options)))


@pytest.mark.parametrize("detail", [False, True])
@pytest.mark.parametrize("name", TRACES)
def test_a_golden_trace_has_whole_trees_with_the_numbers_of_its_summary(name, detail):
    found = made(name, detail=detail)
    assert_trees(found)
    summary = Summary.of(read_trace(GOLD / f"{name}.vtrace"))
    by_name = roots(found)
    assert {life.name for life in summary.requests} == set(by_name)
    for life in summary.requests:
        root = by_name[life.name]
        facts = root.attributes
        assert (
            life.num_prompt_tokens, life.num_output_tokens, life.num_hit_tokens,
            life.num_preemptions, life.num_refusals, life.num_steps, (life.reason,),
        ) == (
            facts[a.INPUT_TOKENS], facts[a.OUTPUT_TOKENS], facts.get(a.CACHE_READ, 0),
            facts[a.NUM_PREEMPTIONS], facts[a.NUM_REFUSALS], facts[a.NUM_STEPS],
            facts[a.FINISH_REASONS],
        )  # fmt: skip
        parts = children(found, root, "prefill", "decode")
        assert life.num_output_tokens == sum(part.attributes[a.NUM_OUTPUT] for part in parts)
        events = [e for part in parts for e in part.events if e.name == "step"]
        of_events = sum(event.attributes[a.NUM_OUTPUT] for event in events)
        prefills = [part for part in parts if part.name == "prefill"]
        assert life.num_output_tokens == of_events + sum(
            part.attributes[a.NUM_OUTPUT] for part in prefills
        )
        assert len(prefills) + len(events) == life.num_steps
        if detail:
            steps = children(found, root, "decode_step")
            assert len(events) == len(steps)
            assert of_events == sum(step.attributes[a.NUM_OUTPUT] for step in steps)
        assert (life.reason == "abort") == bool(root.error)
        assert ("abort" in [event.name for event in root.events]) == (life.reason == "abort")
    steps = {one.attributes[a.STEP]: one.attributes for one in found if one.name == "engine_step"}
    assert [step.step for step in summary.steps] == sorted(steps)
    for step in summary.steps:
        facts = steps[step.step]
        assert (
            step.num_prefill_tokens, step.num_decode_tokens, step.num_requests, step.num_running,
            step.num_waiting, step.num_free_blocks, step.num_preempted,
        ) == (
            facts[a.PREFILL_TOKENS], facts[a.DECODE_TOKENS], facts[a.NUM_REQUESTS],
            facts[a.NUM_RUNNING], facts[a.NUM_WAITING], facts[a.NUM_FREE],
            facts.get(a.NUM_PREEMPTED, 0),
        )  # fmt: skip
    assert not any(a.INCOMPLETE in one.attributes for one in found)


@pytest.mark.parametrize("name", TRACES)
def test_kernels_are_those_of_the_summary(name):
    found = [one for one in made(name) if one.name == "attention"]
    summary = Summary.of(read_trace(GOLD / f"{name}.vtrace"))
    calls, times = Counter(), Counter()
    for one in found:
        key = (one.attributes[a.KERNEL], one.attributes[a.VARIANT])
        calls[key] += one.attributes[a.NUM_CALLS]
        times[key] += one.attributes[a.CALLS_NS]
        assert "CPU_ATTN" == one.attributes[a.BACKEND]
    assert {(k.kernel, k.variant): k.num_calls for k in summary.kernels} == calls
    assert {(k.kernel, k.variant): k.total_ns for k in summary.kernels} == times


@pytest.mark.parametrize("name", TRACES)
def test_every_allocation_and_free_is_a_span_with_the_pool_before_and_after(name):
    state, blocks, expected = KVState(), [], []
    before = None
    for event in read_trace(GOLD / f"{name}.vtrace").events():
        state.apply(event)
        if isinstance(event, SlotsAllocated):
            new = [block for row in event.blocks for block in row]
            expected.append(("allocate", new[:128], before, event.num_free_blocks))
            before = event.num_free_blocks
        elif isinstance(event, BlocksFreed):
            blocks += event.blocks
        elif isinstance(event, RequestFreed):
            free = state.config.num_blocks - 1 - len(state.ref_cnts)
            expected.append(("free", blocks[:128], before, free))
            before, blocks = free, []
        elif hasattr(event, "num_free_blocks"):
            before = event.num_free_blocks
        elif before is None and state.config is not None:
            before = state.num_free_blocks
    found = [
        (
            one.name,
            list(one.attributes[a.NEW_BLOCKS if one.name == "allocate" else a.FREED_BLOCKS]),
            one.attributes[a.FREE_BEFORE],
            one.attributes[a.FREE_AFTER],
        )
        for one in made(name)
        if one.name in ("allocate", "free")
    ]
    assert Counter(map(repr, expected)) == Counter(map(repr, found))


@pytest.mark.parametrize("name", TRACES)
def test_the_reason_of_every_lookup_is_the_one_that_explain_finds(name):
    """One reading with all hashes against ``explain``'s reading for each request."""
    events = list(read_trace(GOLD / f"{name}.vtrace").events())
    hashes: dict[int, set[int]] = {}
    for event in events:
        if event.kind == "request.arrived":
            hashes.setdefault(event.request, set()).update(event.block_hashes)
        if isinstance(event, PrefixLookedUp):
            hashes.setdefault(event.request, set()).update(event.new_hashes)
    history = PrefixHistory()
    books = {request: HashBook(request, wanted) for request, wanted in hashes.items()}
    judged = 0
    for event in events:
        for book in books.values():
            _tell(book, event)
        found = _tell(history, event)
        if isinstance(event, PrefixLookedUp):
            expected = books[event.request].looked_up(event)
            history.judge()
            assert (expected.cause, expected.index, expected.taker) == (
                found.miss.cause, found.miss.index, found.miss.taker,
            )  # fmt: skip
            assert found.miss.cause in CAUSES
            judged += 1
    assert judged


def _tell(book: Any, event: Any) -> Any:
    history = isinstance(book, PrefixHistory)
    match event.kind:
        case "engine.configured":
            book.configured(event)
        case "request.arrived":
            book.arrived(event) if history else book.arrived(event, None)
        case "blocks.cached":
            book.blocks_cached(event) if history else book.cached(0, event)
        case "block.evicted":
            book.block_evicted(event) if history else book.evicted(1, event)
        case "slots.allocated":
            book.took(event.request)
        case "prefix.reset":
            book.reset() if history else book.reset(1)
        case "prefix.looked_up":
            return book.looked_up(event) if history else None


def test_a_preempted_request_tells_of_its_two_waits():
    found = made("preempt")
    root = roots(found)["r-2"]
    assert [
        "queued", "schedule", "prefix_lookup", "allocate", "prefill", "decode", "free", "preempt",
        "queued", "schedule", "prefix_lookup", "allocate", "prefill", "decode", "allocate", "free",
    ] == [one.name for one in children(found, root)]  # fmt: skip
    first, second = children(found, root, "queued")
    assert a.RESUMED not in first.attributes and second.attributes[a.RESUMED]
    (preempt,) = children(found, root, "preempt")
    assert (64, "r-2") == (preempt.attributes[a.NUM_COMPUTED], preempt.attributes[a.CAUSED_BY])
    assert preempt.end_ns == second.start_ns
    # Refused once when it had to give way, and 54 times while it waited.
    assert (54, 54) == (second.attributes[a.NUM_REFUSALS], len(second.events))
    assert 1 == [event.name for event in root.events].count("refused")
    lookups = children(found, root, "prefix_lookup")
    assert [("none shared", 1), ("evicted", 55)] == [
        (one.attributes[a.REASON], one.attributes[a.NUM_LOOKUPS]) for one in lookups
    ]
    assert "r-1" == lookups[1].attributes[a.EVICTED_BY]
    schedules = children(found, root, "schedule")
    assert [61] == [one.attributes[a.STEP] for one in schedules if one.attributes.get(a.RESUMED)]
    decode = children(found, root, "decode")[1]
    (grown,) = [one for one in children(found, root, "allocate") if one.parent_id == decode.span_id]
    assert (2,) == grown.attributes[a.NEW_BLOCKS]


def test_links_lead_to_the_steps_and_back():
    found = made("chunked")
    steps = {one.trace_id: one for one in found if one.name == "engine_step"}
    by_number = {one.attributes[a.STEP]: one for one in steps.values()}
    linked = [one for one in found if one.name in ("schedule", "prefill") and one.links]
    assert len(linked) == 2 * sum(one.name == "prefill" for one in found)
    for one in linked:
        (link,) = one.links
        step = by_number[one.attributes[a.STEP]]
        assert (step.trace_id, step.span_id) == (link.trace_id, link.span_id)
    for one in (one for one in found if one.name == "decode"):
        ends = [by_number[one.attributes[name]] for name in (a.FIRST_STEP, a.LAST_STEP)]
        assert [end.trace_id for end in ends] == [link.trace_id for link in one.links]
    by_root = {one.span_id for one in roots(found).values()}
    assert by_root == {link.span_id for step in steps.values() for link in step.links}


def test_attributes_and_names_are_those_of_the_table():
    types = {
        "int": int, "string": str, "double": float, "bool": bool, "int[]": tuple, "string[]": tuple,
    }  # fmt: skip
    seen: dict[str, set[str]] = {}
    events = set()
    for name in TRACES:
        for one in made(name, detail=True):
            for key, value in one.attributes.items():
                assert type(value) is types[a.ATTRIBUTES[key].type], (key, value)
                seen.setdefault(key, set()).add(one.name)
            for key in one.resource.attributes:
                seen.setdefault(key, set()).add("resource")
            for event in one.events:
                events.add(event.name)
                for key in event.attributes:
                    seen.setdefault(key, set()).add(event.name)
            assert one.name in a.SPANS
    assert events <= a.EVENTS.keys()
    for key, places in seen.items():
        told = set(a.ATTRIBUTES[key].on.split())
        assert places <= told or "any" in told, (key, places - told)
    # What no golden trace has; each of them is seen in a test of its own.
    rare = {
        a.BAD_TRACEPARENT, a.INCOMPLETE, a.PROMPT_TOKEN_IDS, a.OUTPUT_TOKEN_IDS, a.LORA, a.SALTED,
        a.PRIORITY, a.SEED, a.TOP_K, a.CHOICES,
    }  # fmt: skip
    assert a.ATTRIBUTES.keys() - seen.keys() <= rare


def test_names_of_opentelemetry_are_its_own():
    known = set()
    for module in ("gen_ai", "error", "service", "host", "process", "telemetry"):
        found = import_module(f"opentelemetry.semconv._incubating.attributes.{module}_attributes")
        known |= {value for name, value in vars(found).items() if isinstance(value, str)}
    for module in ("error", "service", "telemetry"):
        found = import_module(f"opentelemetry.semconv.attributes.{module}_attributes")
        known |= {value for name, value in vars(found).items() if isinstance(value, str)}
    foreign = [name for name in a.ATTRIBUTES if not name.startswith("vllm_trace.")]
    assert [] == [name for name in foreign if name not in known]


def test_the_same_trace_gives_the_same_ids_and_another_run_others():
    first, again = made("hello"), made("hello")
    assert [(s.trace_id, s.span_id) for s in first] == [(s.trace_id, s.span_id) for s in again]
    other = {s.trace_id for s in made("boundary")}
    assert not other & {s.trace_id for s in first}

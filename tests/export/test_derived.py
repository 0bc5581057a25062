"""Tables that are made of events: blocks, steps, requests."""

from collections import defaultdict

import pytest

pytest.importorskip("pyarrow", reason="not installed: pip install 'vllm-trace[export]'")
pytest.importorskip("duckdb", reason="not installed: pip install 'vllm-trace[export]'")
pytest.importorskip(
    "numba", reason="numba is not installed: there is no compiled reader to compare"
)

from recorded import admitted, arrived, ended, engine, looked_up, step, updated, written

from export.derived_sql import REQUESTS, STEPS
from export.exporting import GOLD, NAMES, exported, rows
from export.test_perfetto import async_trace
from vllm_trace.events import (
    BlockEvicted,
    BlocksCached,
    BlocksFreed,
    BlocksTouched,
    RequestPreempted,
    SlotsAllocated,
    SlotsRefused,
    StepUpdated,
)
from vllm_trace.export import (
    columns,
    compiled,
    fast,
    holding,
    lives,
    parquet,
    steps,
    tenancies,
)
from vllm_trace.summary import Summary
from vllm_trace.trace import read_trace

# Blocks, steps, requests --------------------------------------------------------------------


def tenancies_by_hand(path):
    """The table ``blocks``, made the obvious way: one list, looked through for each event."""
    made, freed, call, last_call = [], [], 0, 0
    lengths, hashed = defaultdict(int), {}
    for number, _, event in read_trace(path).records():
        if isinstance(event, BlocksFreed):
            freed += [(number, block) for block in event.blocks]
        elif isinstance(event, BlocksCached):
            for block in event.blocks:
                hashed[block] = (number, event.request)
                for row in made:
                    mine = (row["block"], row["request"], row["to_event"])
                    if mine == (block, event.request, None) and row["cached_event"] is None:
                        row["cached_event"] = number
        elif isinstance(event, BlockEvicted):
            for row in made:
                waits = row["to_event"] is not None and row["next_event"] is None
                if row["block"] == event.block and waits and row["evicted_event"] is None:
                    row["evicted_event"] = number
        elif event.kind in ("request.freed", "slots.allocated", "slots.refused"):
            for at, block in freed:
                for row in made:
                    if (row["block"], row["request"], row["to_event"]) == (
                        block,
                        event.request,
                        None,
                    ):
                        row["to_event"] = at
                        row["ended"] = "window" if event.kind != "request.freed" else "freed"
            freed = []
            if event.kind == "request.freed":
                for key in [key for key in lengths if key[0] == event.request]:
                    del lengths[key]
            else:
                last_call, call = call, number
        if isinstance(event, SlotsAllocated):
            for how, lists in (("hit", event.hit_blocks), ("new", event.blocks)):
                for group, blocks in enumerate(lists):
                    for block in blocks:
                        place = lengths[event.request, group]
                        lengths[event.request, group] += 1
                        if not block:
                            continue
                        for row in made:
                            over = row["block"] == block and row["to_event"] is not None
                            if over and row["next_event"] is None:
                                row["next_event"] = number
                                row["next_request"], row["next_how"] = event.request, how
                        by = hashed.get(block, (0, None))
                        own = how == "new" and by[1] == event.request and by[0] > last_call
                        sharers = sum(
                            row["block"] == block and row["to_event"] is None for row in made
                        )
                        made.append(
                            dict(
                                block=block, request=event.request, group=group, position=place,
                                how=how, num_sharers=sharers, from_event=number,
                                cached_event=by[0] if own else None, to_event=None, ended="held",
                                evicted_event=None, next_event=None, next_request=None,
                                next_how=None,
                            )
                        )  # fmt: skip
        fates = {"request.preempted": "preempted", "request.finished": "finished"}
        if event.kind in fates:
            fate = "aborted" if getattr(event, "reason", "") == "abort" else fates[event.kind]
            for row in made:
                if row["request"] == event.request and row["ended"] == "freed":
                    row["ended"] = fate
    return sorted(made, key=lambda row: (row["from_event"], row["group"], row["position"]))


def without_times(found):
    skipped = ("process", "from_step", "from_ns", "to_step", "to_ns")
    return [{k: v for k, v in row.items() if k not in skipped} for row in found]


IN_ORDER = 'FROM blocks ORDER BY from_event, "group", position'


@pytest.mark.parametrize("name", NAMES)
def test_the_tenancies_of_a_golden_trace(name, tmp_path):
    found = rows(exported(GOLD / f"{name}.vtrace", tmp_path), IN_ORDER)
    assert tenancies_by_hand(GOLD / f"{name}.vtrace") == without_times(found)


@pytest.mark.parametrize("name", ["mixed", "parallel", "abort"])
def test_the_compiled_loop_follows_blocks_as_the_plain_one(name):
    made = []
    for fold in (holding.fold, compiled.fold):
        follow, found = tenancies.Tenancies(fold), []
        for chunk in columns.chunks(read_trace(GOLD / f"{name}.vtrace")):
            found += [row for batch in follow.take(chunk) for row in batch.to_pylist()]
        made.append(found + [row for batch in follow.end() for row in batch.to_pylist()])
    assert made[0] == made[1] and made[0]


def test_who_took_it_next_in_a_case_worked_by_hand(tmp_path):
    """r-0 gets 1 and 2, caches 1, is aborted; r-1 hits 1 and evicts nothing; r-2 evicts both."""
    events = [
        engine(), arrived(0, "r-0", 6, [9]), *admitted(0, 6, [1, 2], [9], free=6),
        step(1, [0], [6], free=6, new=[0]), *ended(0, [1, 2], "abort"), updated(1, [[1]]),
        arrived(1, "r-1", 5, [9]), looked_up(1, 5, 4, [[1]]), BlocksTouched([1], [1]),
        SlotsAllocated(1, 1, 4, [[2]], [[1]], 6), step(2, [1], [1], free=6, new=[1]),
        *ended(1, [1, 2])[:2], RequestPreempted(1, 5, 8), BlockEvicted(1, [9]),
        *admitted(2, 8, [1, 3]), step(3, [2], [8], new=[2]), SlotsRefused(2, 1, 0, 0),
    ]  # fmt: skip
    found = rows(exported(written(tmp_path / "trace", events), tmp_path), IN_ORDER)
    assert tenancies_by_hand(tmp_path / "trace") == without_times(found)
    told = [(r["block"], r["request"], r["how"], r["ended"], r["next_request"]) for r in found]
    assert [
        (1, 0, "new", "aborted", 1), (2, 0, "new", "aborted", 1),
        (1, 1, "hit", "preempted", 2), (2, 1, "new", "preempted", None),
        (1, 2, "new", "held", None), (3, 2, "new", "held", None),
    ] == told  # fmt: skip
    assert [5, None, None, None, None, None] == [row["cached_event"] for row in found]
    assert [None, None, 20, None, None, None] == [row["evicted_event"] for row in found]
    assert [1, 1, 2, 2, 3, 3] == [row["from_step"] for row in found]


def test_a_second_engine_in_one_process_begins_with_an_empty_pool(tmp_path):
    events = [
        engine(), arrived(0, "a", 4), *admitted(0, 4, [1]), step(1, [0], [4], new=[0]),
        engine(), arrived(1, "b", 4), *admitted(1, 4, [1]), step(1, [1], [4], new=[1]),
        StepUpdated(1, 99, 1, [1]),
    ]  # fmt: skip
    database = exported(written(tmp_path / "trace", events), tmp_path)
    found = rows(database, IN_ORDER)
    assert [("held", None), ("held", None)] == [(r["ended"], r["next_request"]) for r in found]
    assert [None, 1] == [row["num_output_tokens"] for row in rows(database, "FROM steps")]


@pytest.mark.parametrize("name", NAMES)
def test_steps_and_requests_say_what_the_summary_says(name, tmp_path):
    summary = Summary.of(read_trace(GOLD / f"{name}.vtrace"))
    database = exported(GOLD / f"{name}.vtrace", tmp_path)
    same = ("step", "schedule_ns", "execute_ns", "forward_ns", "sample_ns", "num_prefill_tokens",
            "num_decode_tokens", "num_requests", "num_running", "num_waiting", "num_free_blocks",
            "num_preempted", "variant")  # fmt: skip
    told = rows(database, "FROM steps ORDER BY number")
    assert [{k: getattr(one, k) for k in same} for one in summary.steps] == [
        {k: row[k] for k in same} for row in told
    ]
    assert [one.postprocess_ns for one in summary.steps] == [row["update_ns"] for row in told]
    assert summary.num_evictions == sum(row["num_evicted"] for row in told)
    assert summary.num_refusals == sum(row["num_refused"] for row in told)
    told = rows(database, "FROM requests ORDER BY request")
    same = ("request", "name", "arrived_ns", "num_prompt_tokens", "num_preemptions", "num_refusals",
            "lora", "salted")  # fmt: skip
    assert [{k: getattr(one, k) for k in same} for one in summary.requests] == [
        {k: row[k] for k in same} for row in told
    ]
    for one, row in zip(summary.requests, told):
        assert (one.reason, one.num_output_tokens) == (row["reason"], row["num_output_tokens"] or 0)
        assert one.num_hit_tokens == (row["num_hit_tokens"] or 0)
        assert one.num_resume_hit_tokens == (row["num_resume_hit_tokens"] or 0)
        assert (one.num_steps, one.first_step, one.last_step, one.first_scheduled_ns) == (
            row["num_steps"] or 0, row["first_step"] or 0, row["last_step"] or 0,
            row["scheduled_ns"] or 0,
        )  # fmt: skip


def as_sql_says(database):
    for name, query in (("steps", STEPS), ("requests", REQUESTS)):
        wanted = database.sql(query).to_arrow_table()
        found = database.sql(f"FROM {name}").to_arrow_table()
        assert wanted.schema == found.schema
        assert wanted.to_pylist() == found.to_pylist()


@pytest.mark.parametrize("name", NAMES)
def test_steps_and_requests_are_what_sql_makes_of_the_events(name, tmp_path):
    as_sql_says(exported(GOLD / f"{name}.vtrace", tmp_path))


@pytest.mark.parametrize("later", [40, steps.LATER])
@pytest.mark.parametrize("compiled_from", [0, 1 << 60])
@pytest.mark.parametrize("level", ["full", "light"])
def test_those_of_a_fresh_trace_too(level, compiled_from, later, fresh, tmp_path, monkeypatch):
    """In small pieces, and with rows that wait no longer than they must."""
    monkeypatch.setattr(parquet, "FAST_FROM", compiled_from)
    monkeypatch.setattr(fast, "PIECE", 20_000)
    monkeypatch.setattr(columns, "CHUNK", 300)
    monkeypatch.setattr(steps, "LATER", later)
    monkeypatch.setattr(lives, "LATER", later)
    as_sql_says(exported(fresh[level], tmp_path))


def test_those_of_several_processes(tmp_path, monkeypatch):
    as_sql_says(exported(async_trace(tmp_path / "trace"), tmp_path))


def test_too_many_rows_do_not_wait_for_one_request(tmp_path, monkeypatch):
    """The first lives on; those after it are written when three rows wait."""
    monkeypatch.setattr(columns, "CHUNK", 4)
    monkeypatch.setattr(lives, "LATER", 0)
    monkeypatch.setattr(lives, "MOST_HELD", 2)
    events = [engine(), arrived(0, "long", 4)]
    for number in range(1, 9):
        events += [arrived(number, f"r-{number}", 4), *ended(number, [1])]
    database = exported(written(tmp_path / "trace", events), tmp_path)
    found = [row["request"] for row in rows(database, "FROM requests")]
    assert [*range(9)] == sorted(found) and found.index(0) > 0

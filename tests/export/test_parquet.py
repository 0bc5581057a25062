"""The tables: every event whole, the compiled reader's as the other's, what they say of blocks."""

import json
import tempfile
from collections import defaultdict
from pathlib import Path

import pytest

pytest.importorskip("pyarrow", reason="not installed: pip install 'vllm-trace[export]'")
pytest.importorskip("duckdb", reason="not installed: pip install 'vllm-trace[export]'")
pytest.importorskip(
    "numba", reason="numba is not installed: there is no compiled reader to compare"
)

import pyarrow.parquet as pq
from fakes.events import batches as any_batches
from helpers import configured, run_cli, write_trace
from hypothesis import given
from hypothesis import strategies as st
from recorded import admitted, arrived, ended, engine, looked_up, step, updated, written

from export.derived_sql import REQUESTS, STEPS
from export.test_perfetto import async_trace
from vllm_trace.errors import TraceError
from vllm_trace.events import (
    EVENT_TYPES,
    BlockEvicted,
    BlocksCached,
    BlocksFreed,
    BlocksTouched,
    RequestPreempted,
    SlotsAllocated,
    SlotsRefused,
    StepScheduled,
    StepUpdated,
    to_dict,
)
from vllm_trace.export import (
    ExportOptions,
    columns,
    compiled,
    export,
    fast,
    holding,
    lives,
    parquet,
    steps,
    tables,
    tenancies,
)
from vllm_trace.export.derived import connect
from vllm_trace.summary import Summary
from vllm_trace.trace import read_trace, time_of
from vllm_trace.tracefile import SUFFIX, TAIL_SUFFIX, TraceFile, decode_batch
from vllm_trace.tracewriter import TraceWriter, _frame

GOLD = Path(__file__).parent.parent / "gold"
NAMES = sorted(path.stem for path in GOLD.glob("*.vtrace"))


def exported(path, folder, **options):
    """DuckDB over the tables of a trace."""
    export(read_trace(path), "parquet", str(folder / "tables"), ExportOptions(**options))
    return connect(folder / "tables")


def rows(database, query):
    found = database.execute(query)
    names = [column[0] for column in found.description]
    return [dict(zip(names, row)) for row in found.fetchall()]


# Events -----------------------------------------------------------------------------------


def as_table(value):
    """A field of ``to_dict`` in the form in which the table has it."""
    if isinstance(value, dict):
        return list(value.items())
    return value


@pytest.mark.parametrize("name", NAMES)
def test_the_tables_hold_every_event_whole(name, tmp_path):
    export(read_trace(GOLD / f"{name}.vtrace"), "parquet", str(tmp_path / "t"))
    wanted = defaultdict(list)
    for record in read_trace(GOLD / f"{name}.vtrace").records():
        event = to_dict(record.event) | {"number": record.number, "process": 0}
        wanted[event.pop("kind")].append(event)
    for cls in EVENT_TYPES:
        found = pq.read_table(tmp_path / "t" / f"{tables.table_name(cls.kind)}.parquet")
        assert found.schema.remove_metadata() == tables.SCHEMAS[cls]
        told = found.to_pylist()
        assert len(wanted[cls.kind]) == len(told)
        for event, row in zip(wanted[cls.kind], told):
            for field, value in event.items():
                if tables.is_json(cls, field) if field in tables.HINTS[cls] else False:
                    assert json.loads(json.dumps(value)) == json.loads(row[field])
                elif field == "candidates":
                    assert [list(pair) for pair in value] == [
                        [pair["backend"], pair["rejected"]] for pair in row[field]
                    ]
                else:
                    assert as_table(value) == row[field], (cls.kind, field)


def test_an_event_without_step_and_time_has_those_of_its_call(tmp_path):
    database = exported(GOLD / "preempt.vtrace", tmp_path)
    upcoming = {}
    wanted = {}
    for record in reversed(list(read_trace(GOLD / "preempt.vtrace").records())):
        event = record.event
        if event.kind in ("step.scheduled", "step.updated"):
            upcoming["step"] = event.step
        upcoming["at"] = upcoming.get("at") if time_of(event) is None else time_of(event)
        wanted[record.number] = (getattr(event, "step", upcoming.get("step")), upcoming["at"])
    seen = 0
    for cls in EVENT_TYPES:
        query = f"SELECT number, step, at_ns FROM {tables.table_name(cls.kind)}"
        for number, step_, at in database.execute(query).fetchall():
            assert wanted[number] == (step_, at), cls.kind
            seen += 1
    assert len(wanted) == seen


def whole(chunks):
    """All rows of each kind."""
    found = defaultdict(list)
    for chunk in chunks:
        for cls, batch in chunk.items():
            found[cls].extend(batch.to_pylist())
    return {cls: found[cls] for cls in EVENT_TYPES if cls in found}


def both(path, tokens=True):
    """The chunks of both readers, and the names that they learned."""
    slow, quick = read_trace(path), read_trace(path)
    return (
        (whole(columns.chunks(slow, tokens)), slow.names, slow.problems),
        (whole(fast.chunks(quick.files[0], quick.names, tokens)), quick.names, quick.problems),
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_compiled_reader_reads_the_same(name):
    slow, quick = both(GOLD / f"{name}.vtrace")
    assert slow == quick


def test_it_reads_on_over_pieces_and_chunks(tmp_path, monkeypatch):
    """Steps, sizes and repeated lists go from one piece to the next, and from chunk to chunk."""
    monkeypatch.setattr(fast, "PIECE", 500)
    monkeypatch.setattr(columns, "CHUNK", 200)
    for name in ("mixed", "preempt"):
        slow, quick = both(GOLD / f"{name}.vtrace")
        assert slow == quick


def fitting(value, name=""):
    """The same with every number brought into the width of its column."""
    if isinstance(value, bool | str | float) or value is None:
        return value
    if isinstance(value, int):
        return value % 2**64 if name in tables.HASHES else (value + 2**63) % 2**64 - 2**63
    if isinstance(value, list):
        return [fitting(one, name) for one in value]
    if isinstance(value, tuple):  # of kv_events.taken: what, hashes
        return tuple(fitting(one, "hashes") for one in value)
    if isinstance(value, dict):
        return {fitting(k): fitting(v) for k, v in value.items()}
    for each in value.__struct_fields__:
        setattr(value, each, fitting(getattr(value, each), each))
    return value


@given(any_batches, st.sampled_from(["full", "light"]), st.booleans(), st.integers(0, 5))
def test_it_reads_the_same_from_any_events_or_leaves_them_to_the_other(
    batches, level, killed, as_they_are
):
    batches = batches if not as_they_are else fitting(batches)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"main-1{SUFFIX}"
        writer = TraceWriter(path, {"schema": 1, "role": "main", "pid": 0, "level": level})
        for batch in batches:
            writer.write(batch)
        if not killed:
            writer.close({"dropped": 0})
        try:
            quick = read_trace(path)
            found = whole(fast.chunks(quick.files[0], quick.names, True))
        except fast.Unusual:
            return
        slow = read_trace(path)
        try:
            wanted = whole(columns.chunks(slow, True))
        except TraceError:  # a number that no column holds: both must refuse
            raise AssertionError("the compiled reader took what the other refuses") from None
        assert repr(wanted) == repr(found)
        assert (slow.names, slow.problems) == (quick.names, quick.problems)


# What a recorder leaves to the reader ---------------------------------------------------------


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """Traces of vLLM's own scheduler, recorded now, by level."""
    pytest.importorskip("vllm", reason="vLLM is not installed: there is no scheduler to record")
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(Path(__file__).parents[2])
        from bench import arms
        from bench.engine import Engine

        folder, core = tmp_path_factory.mktemp("fresh"), Engine()
        return {
            level: arms.trace_of(lambda: core.serve(150), folder / level, level=level)
            for level in ("full", "light")
        }


def on_disk(path):
    """The events as they are in the file, with nothing put back."""
    file = TraceFile(path)
    for raw in file.frames():
        position = 0
        while position < len(raw):
            size = int.from_bytes(raw[position : position + 4], "little")
            yield from decode_batch(raw[position + 4 : position + 4 + size])
            position += 4 + size


@pytest.mark.parametrize("piece", [2000, fast.PIECE])
@pytest.mark.parametrize("level", ["full", "light"])
def test_a_fresh_trace_of_the_real_scheduler_reads_the_same(level, piece, fresh, monkeypatch):
    """Steps that are as the last one, calls that only the step's composition can place."""
    told = list(on_disk(fresh[level]))
    told_steps = [event for event in told if type(event) is StepScheduled]
    assert any(step.requests is None for step in told_steps)
    if level == "full":
        assert any(step.num_kept < 0 for step in told_steps)
        assert any(type(event) is SlotsAllocated and event.num_kept < 0 for event in told)
    monkeypatch.setattr(fast, "PIECE", piece)
    slow, quick = both(fresh[level])
    assert slow == quick
    assert all(row["num_kept"] >= 0 for row in quick[0][StepScheduled])


@given(st.data())
def test_silent_calls_are_counted_as_by_the_plain_reader(data):
    """Any calls before any steps; a step in a piece of its own, or in one with its calls."""
    number = st.integers(0, 4)
    call = st.builds(SlotsAllocated, number, st.just(1), st.just(0), st.just([[1]]), st.just([[]]),
                     st.just(3), st.sampled_from([-1, 0, 2]))  # fmt: skip
    refused = st.builds(SlotsRefused, number, st.just(1), st.just(0), st.just(3), st.just(-1))
    asked = st.lists(number, unique=True).map(lambda requests: (requests, [1] * len(requests)))
    same = st.just((None, None))
    batches = []
    for count in range(1, data.draw(st.integers(1, 5)) + 1):
        requests, num_tokens = data.draw(asked | same)
        kept = data.draw(st.sampled_from([-1, -1, 3]))
        events = data.draw(st.lists(call | refused, max_size=5))
        events.append(StepScheduled(count, count, 1, 1, 1, 1, kept, requests, num_tokens))
        if data.draw(st.booleans()):
            batches += [[event] for event in events]
        else:
            batches.append(events)
    batches.append(data.draw(st.lists(call, max_size=3)) + [StepUpdated(1, 99, 1)])
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patched:
        path = write_trace(Path(folder), "main", 1, batches)
        patched.setattr(fast, "PIECE", data.draw(st.sampled_from([1, 60, 10_000])))
        slow, quick = both(path)
        assert slow == quick


def test_unusual_bytes_are_read_on_by_the_other(tmp_path, monkeypatch):
    """A number of half the width, which no recorder writes and msgspec takes."""
    import msgspec

    usual = [looked_up(0, 4), *ended(0, [1])]
    bodies = [msgspec.msgpack.encode([event]) for event in usual]
    odd = msgspec.msgpack.encode([arrived(1, "odd", 4)])
    bodies.insert(2, odd.replace(b"\xcb" + bytes(8), b"\xca" + bytes(4), 1))
    trace = written(tmp_path / "trace", [])
    path = next(trace.glob("*.vtrace"))
    raw = b"".join(len(body).to_bytes(4, "little") + body for body in bodies)
    data = path.read_bytes()
    footer = data.index(b"F", len(data) - 80)
    import zstandard

    frame = _frame(b"E", raw, zstandard.ZstdCompressor().compress)
    path.write_bytes(data[:footer] + frame + data[footer:])
    monkeypatch.setattr(fast, "PIECE", 10)
    quick, slow = read_trace(trace), read_trace(trace)
    with pytest.raises(fast.Unusual):
        whole(fast.chunks(quick.files[0], {}))
    assert whole(columns.chunks(slow)) == whole(compiled.chunks(quick))


def test_several_processes_in_one_set_of_tables(tmp_path):
    database = exported(async_trace(tmp_path / "trace"), tmp_path)
    assert [(0, "engine"), (1, "worker"), (2, "worker")] == database.execute(
        "SELECT process, role FROM trace ORDER BY 1"
    ).fetchall()
    told = rows(database, "SELECT step, process, rank FROM step_executed ORDER BY step, rank")
    assert [(1, 1, 0), (1, 2, 1), (2, 1, 0), (2, 2, 1)] == [tuple(row.values()) for row in told]
    (first, second) = rows(database, "FROM steps")
    assert (4, 2, 11) == (first["execute_ns"], first["forward_ns"], first["wall_ns"])
    assert (2, 1, 0) == (second["step"], second["num_decode_tokens"], second["num_prefill_tokens"])


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


# What is missing, what is secret, what is bounded --------------------------------------------


def metadata(path):
    found = pq.read_metadata(path).metadata
    return {key.decode(): value.decode() for key, value in found.items()}


def test_every_file_says_what_it_is_and_that_it_is_whole(tmp_path):
    export(read_trace(GOLD / "hello.vtrace"), "parquet", str(tmp_path / "t"))
    files = sorted((tmp_path / "t").iterdir())
    assert {tables.table_name(cls.kind) for cls in EVENT_TYPES} | {
        "blocks", "requests", "steps", "trace"
    } == {file.stem for file in files}  # fmt: skip
    for file in files:
        told = metadata(file)
        assert ("1", "0.32.0", "full", "yes", "[]") == tuple(
            told[key] for key in (
                "vllm_trace.schema", "vllm", "level", "vllm_trace.complete", "vllm_trace.problems",
            )
        )  # fmt: skip
        for group in range(pq.read_metadata(file).num_row_groups):
            assert "ZSTD" == pq.read_metadata(file).row_group(group).column(0).compression


def test_a_trace_that_is_not_whole_is_exported_as_far_as_it_goes_and_marked(tmp_path):
    whole_file = (GOLD / "preempt.vtrace").read_bytes()
    (tmp_path / "cut.vtrace").write_bytes(whole_file[:-100])
    done = run_cli("export", "cut.vtrace", "--to", "parquet", "-o", "t", cwd=tmp_path)
    assert 0 == done.returncode
    assert "truncated" in done.stderr and "vllm_trace.complete is no" in done.stderr
    for file in (tmp_path / "t").iterdir():
        told = metadata(file)
        assert "no" == told["vllm_trace.complete"]
        assert "truncated" in json.loads(told["vllm_trace.problems"])[0]
    ((text,),) = connect(tmp_path / "t").execute("SELECT truncated FROM trace").fetchall()
    assert "torn frame" in text or "no footer" in text


def test_the_tail_of_a_killed_process_is_in_it(tmp_path):
    (tmp_path / "trace").mkdir()
    writer = TraceWriter(tmp_path / "trace" / f"main-1{SUFFIX}", {"schema": 1, "role": "main"})
    writer.write([engine(), arrived(0, "a", 4)])
    assert (tmp_path / "trace" / f"main-1{SUFFIX}{TAIL_SUFFIX}").exists()
    slow, quick = both(tmp_path / "trace")
    assert slow == quick and 2 == sum(map(len, quick[0].values()))
    assert "truncated" in quick[2][0]


@pytest.mark.parametrize("events", [[], [engine()], [engine(), arrived(0, "a", 4)]], ids=len)
def test_a_trace_of_next_to_nothing(events, tmp_path):
    database = exported(written(tmp_path / "trace", events), tmp_path)
    counts = [
        database.execute(f"SELECT count(*) FROM {name}").fetchall()[0][0]
        for name in ("engine_configured", "requests", "steps", "blocks", "trace")
    ]
    assert [len(events) > 0, len(events) > 1, 0, 0, 1] == counts


@pytest.mark.parametrize("reader", ["plain", "compiled"])
def test_token_ids_leave_only_when_they_are_asked_for(reader, tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "FAST_FROM", 0 if reader == "compiled" else 1 << 60)
    events = [engine(), arrived(0, "r-0", 3, token_ids=[71, 72]), updated(1, [[73]])]
    written(tmp_path / "trace", events, tokens=True)
    query = "SELECT a.token_ids, u.token_ids FROM request_arrived a, step_updated u"
    database = exported(tmp_path / "trace", tmp_path)
    assert [(None, None)] == database.execute(query).fetchall()
    database = exported(tmp_path / "trace", tmp_path, tokens=True)
    assert [([71, 72], [[73]])] == database.execute(query).fetchall()


def test_a_light_trace(tmp_path):
    events = [
        configured(), arrived(0, "a", 5), step(1, [0], [5], new=[0]), StepUpdated(1, 15, 1),
        step(2, [0], [1]), StepUpdated(2, 25, 1),
    ]  # fmt: skip
    write_trace(tmp_path / "trace", "main", 1, [[one] for one in events], level="light")
    slow, quick = both(tmp_path / "trace")
    assert slow == quick
    first, second = rows(exported(tmp_path / "trace", tmp_path), "FROM steps ORDER BY step")
    assert (5, 0, None) == (
        first["num_prefill_tokens"],
        first["num_decode_tokens"],
        first["num_output_tokens"],
    )
    assert (0, 1) == (second["num_prefill_tokens"], second["num_decode_tokens"])


def test_row_groups_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "ROWS", 100)
    monkeypatch.setattr(columns, "CHUNK", 60)
    export(read_trace(GOLD / "mixed.vtrace"), "parquet", str(tmp_path / "t"))
    found = pq.read_metadata(tmp_path / "t" / "blocks_taken.parquet")
    sizes = [found.row_group(group).num_rows for group in range(found.num_row_groups)]
    assert 450 == sum(sizes) and max(sizes) <= 160 and len(sizes) >= 3


def test_a_number_that_no_engine_has_is_an_error_and_leaves_nothing(tmp_path):
    written(tmp_path / "trace", [engine(), looked_up(0, 2**63)])
    with pytest.raises(TraceError, match=r"a prefix.looked_up has a number in num_tokens"):
        export(read_trace(tmp_path / "trace"), "parquet", str(tmp_path / "t"))
    assert ["trace"] == [path.name for path in tmp_path.iterdir()]


def test_the_command(tmp_path):
    done = run_cli("export", GOLD / "mixed.vtrace", "--to", "parquet", "-o", "t", cwd=tmp_path)
    assert (0, "") == (done.returncode, done.stdout)
    assert "wrote 6644 events, 1332 tenancies of blocks to t" in done.stderr

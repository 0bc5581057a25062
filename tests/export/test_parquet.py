"""The tables: every event whole, what is missing, what is secret, what is bounded."""

import json
from collections import defaultdict

import pytest

pytest.importorskip("pyarrow", reason="not installed: pip install 'vllm-trace[export]'")
pytest.importorskip("duckdb", reason="not installed: pip install 'vllm-trace[export]'")
pytest.importorskip(
    "numba", reason="numba is not installed: there is no compiled reader to compare"
)

import pyarrow.parquet as pq
from helpers import configured, run_cli, write_trace
from recorded import arrived, engine, looked_up, step, updated, written

from export.exporting import GOLD, NAMES, both, exported, rows
from export.test_perfetto import async_trace
from vllm_trace.errors import TraceError
from vllm_trace.events import (
    EVENT_TYPES,
    StepUpdated,
    to_dict,
)
from vllm_trace.export import (
    columns,
    export,
    parquet,
    tables,
)
from vllm_trace.export.derived import connect
from vllm_trace.trace import read_trace, time_of

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

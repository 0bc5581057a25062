"""Following a trace that grows, and sending its spans from a process beside the engine."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from helpers import command, run_cli
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from export.receiver import Inbox, closed_port, grpc_receiver, half_open, http_receiver
from vllm_trace import sidecar
from vllm_trace.errors import UsageError
from vllm_trace.events import SCHEMA_VERSION, BlocksFreed, StepScheduled
from vllm_trace.export import ExportOptions, streaming
from vllm_trace.export.spans import spans
from vllm_trace.growing import GrowingFile, GrowingTrace
from vllm_trace.trace import read_trace
from vllm_trace.tracefile import SUFFIX
from vllm_trace.tracewriter import TraceWriter, seal

GOLD = Path(__file__).resolve().parent.parent / "gold"
HEADER = {"schema": SCHEMA_VERSION, "role": "main", "pid": os.getpid(), "host": "here"}


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("OTEL_", "VTRACE_OTLP"))]:
        monkeypatch.delenv(name)
    # A busy machine is no failing receiver: nothing is sent twice or given up before these are over.
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "60")
    monkeypatch.setenv("OTEL_BSP_EXPORT_TIMEOUT", "80000")


@pytest.fixture
def nobody(monkeypatch):
    """The address of a receiver that is gone; the exporter tries again for two seconds."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "2")
    return closed_port()


def golden(name: str) -> Counter[bytes]:
    return Counter(span.span_id for span in spans(read_trace(GOLD / f"{name}.vtrace")))


# The file ---------------------------------------------------------------------------------


class Following(RuleBasedStateMachine):
    """Whatever a writer does between two polls, each batch is seen once and in order."""

    @initialize()
    def open(self):
        import tempfile

        self.folder = tempfile.TemporaryDirectory(prefix="vllm-trace-follow-")
        self.path = Path(self.folder.name) / f"main-1{SUFFIX}"
        self.writer = TraceWriter(self.path, HEADER, tail_size=1024)
        self.reader = GrowingFile(self.path)
        self.number = 0
        self.written: list[list[int]] = []
        self.seen: list[list[int]] = []
        self.closed = False

    @rule(sizes=st.lists(st.integers(1, 60), min_size=1, max_size=6))
    def write(self, sizes):
        if not self.closed:
            for size in sizes:
                self.number += 1
                self.writer.write([BlocksFreed([self.number] * size, [0] * size)])
                self.written.append([self.number] * size)

    @rule()
    def write_more_than_a_tail_holds(self):
        if not self.closed:
            self.number += 1
            self.writer.write([BlocksFreed([self.number] * 3000, [0] * 3000)])
            self.written.append([self.number] * 3000)

    @rule()
    def flush(self):
        if not self.closed:
            self.writer.flush_tail()

    @rule()
    def poll(self):
        for batch in self.reader.new_batches():
            self.seen += [event.blocks for event in batch]

    @rule()
    def close(self):
        if not self.closed:
            self.writer.close({})
            self.closed = True

    @invariant()
    def seen_is_a_beginning_of_what_was_written(self):
        if hasattr(self, "seen"):
            assert self.written[: len(self.seen)] == self.seen

    def teardown(self):
        if hasattr(self, "writer"):
            self.poll()
            assert self.written == self.seen
            assert self.closed == self.reader.ended
            self.writer.close({})
            self.poll()
            assert self.reader.ended and self.written == self.seen
            self.folder.cleanup()


TestFollowing = Following.TestCase


def test_a_writer_in_another_thread_is_followed_without_a_gap(tmp_path):
    """No rule of the writer's is bent while it writes: tail, frames and resets at full speed."""
    path = tmp_path / f"main-1{SUFFIX}"
    writer = TraceWriter(path, HEADER, tail_size=2048)
    total = 30_000

    def write():
        for number in range(total):
            writer.write([BlocksFreed([number, number], [0, 0])])
        writer.close({})

    thread = threading.Thread(target=write)
    reader, seen = GrowingFile(path), []
    thread.start()
    while not reader.ended:
        for batch in reader.new_batches():
            seen += [event.blocks[0] for event in batch]
    thread.join()
    assert [*range(total)] == seen


@given(st.integers(0, 40), st.integers(0, 40))
def test_a_killed_process_is_read_to_its_end_and_its_seal(before, after):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"main-1{SUFFIX}"
        gone = subprocess_that_ended()
        writer = TraceWriter(path, HEADER | {"pid": gone}, tail_size=512)
        reader, seen = GrowingFile(path), []

        def write(count):
            for _ in range(count):
                writer.write([BlocksFreed([len(written)], [0])])
                written.append(len(written))

        def read():
            for batch in reader.new_batches():
                seen.extend(event.blocks[0] for event in batch)

        written: list[int] = []
        write(before)
        read()
        assert written == seen and not reader.is_written
        write(after)
        writer._file.close()  # as a killed process leaves it
        assert seal(path, "killed")
        read()
        assert written == seen and reader.ended and "killed" in reader.truncated


_ENDED: list[int] = []


def subprocess_that_ended() -> int:
    if not _ENDED:
        process = subprocess.Popen([sys.executable, "-c", "pass"])
        process.wait()
        _ENDED.append(process.pid)
    return _ENDED[0]


def test_steps_that_lean_on_the_one_before_are_whole(tmp_path):
    """On disk a list is left out when it is as in the last step; a follower puts it back."""
    writer = TraceWriter(tmp_path / f"main-1{SUFFIX}", HEADER)
    followed, steps = GrowingTrace(tmp_path), []

    def poll():
        for _, events in followed.new_batches():
            steps.extend(event.requests for event in events)

    writer.write([StepScheduled(1, 1, 1, 1, 0, 5, 0, [3], [1])])
    poll()
    writer.write([StepScheduled(2, 2, 1, 1, 0, 5, 0)])
    writer.flush_tail()
    poll()
    writer.write([StepScheduled(3, 3, 1, 1, 0, 5, 0)])
    writer.close({})
    poll()
    assert [[3], [3], [3]] == steps


def test_who_follows_a_trace_ends_when_it_is_removed(tmp_path):
    watch, trace = sidecar.Watch(seconds=-1), GrowingTrace(tmp_path)
    assert not list(trace.new_batches()) and not watch(trace)  # it may still come
    writer = TraceWriter(tmp_path / f"main-1{SUFFIX}", HEADER | {"pid": os.getpid()})
    assert not list(trace.new_batches()) and not watch(trace)
    writer.path.unlink()
    assert not list(trace.new_batches()) and watch(trace)
    assert [f"{writer.path} was removed while it was read"] == trace.problems
    writer.close({})


# Sending ----------------------------------------------------------------------------------


class Growing:
    """A golden trace that is written again, batch by batch."""

    def __init__(self, name: str, folder: Path) -> None:
        self.file = read_trace(GOLD / f"{name}.vtrace").files[0]
        folder.mkdir(parents=True)
        header = self.file.header | {"pid": os.getpid()}
        # The ids hang on the header: the process that is followed must be the golden one's.
        self.writer = TraceWriter(folder / f"main-1{SUFFIX}", self.file.header)
        self.header = header

    def write(self) -> None:
        for batch in self.file.batches():
            self.writer.write(batch)
        self.writer.close({})


def streamed(folder: Path, url: str, write, **options) -> streaming.Streamed:
    """``stream`` while ``write`` runs."""
    thread = threading.Thread(target=write)
    thread.start()
    try:
        return streaming.stream(
            folder, url, ExportOptions(), lambda followed: not thread.is_alive(), **options
        )
    finally:
        thread.join()


@pytest.mark.parametrize("name", ["prefix", "mixed", "preempt"])
def test_what_is_streamed_is_what_is_exported_afterwards(name, tmp_path):
    growing, inbox = Growing(name, tmp_path / "t"), Inbox()
    with grpc_receiver(inbox) as url:
        done = streamed(tmp_path / "t", url, growing.write)
    assert golden(name) == Counter(span.span_id for span, _ in inbox.spans)
    assert (sum(golden(name).values()), 0) == (done.delivered.sent, done.delivered.dropped)
    assert (0, []) == (done.late, done.problems)


def test_spans_arrive_while_the_run_goes_on(tmp_path):
    growing, inbox = Growing("mixed", tmp_path / "t"), Inbox()
    arrived = []

    def write():
        for number, batch in enumerate(growing.file.batches()):
            growing.writer.write(batch)
            if number == 300:
                deadline = time.monotonic() + 100
                while not inbox.requests and time.monotonic() < deadline:
                    time.sleep(0.02)
                arrived.append(len(inbox.requests))
        growing.writer.close({})

    with grpc_receiver(inbox) as url:
        streamed(tmp_path / "t", url, write)
    assert arrived[0] > 0
    assert golden("mixed") == Counter(span.span_id for span, _ in inbox.spans)


def test_a_slow_receiver_gets_everything_and_memory_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "MAX_WAITING", 2)
    growing, inbox = Growing("mixed", tmp_path / "t"), Inbox()
    inbox.delay = 0.05
    sizes = []
    usual = streaming._Pump.put

    def put(self, batch):
        usual(self, batch)
        sizes.append(self._queue.qsize())

    monkeypatch.setattr(streaming._Pump, "put", put)
    with grpc_receiver(inbox) as url:
        done = streamed(tmp_path / "t", url, growing.write)
    assert 0 == done.delivered.dropped
    assert golden("mixed") == Counter(span.span_id for span, _ in inbox.spans)
    assert max(sizes) <= 2


def test_a_receiver_that_is_gone_costs_no_more_than_a_try_and_everything_is_counted(
    tmp_path, nobody
):
    growing = Growing("mixed", tmp_path / "t")
    done = streamed(tmp_path / "t", nobody, growing.write)
    total = sum(golden("mixed").values())
    assert (0, total) == (done.delivered.sent, done.delivered.dropped)
    assert total == sum(done.delivered.reasons.values())
    assert any("refused" in reason.lower() for reason in done.delivered.reasons)


def test_a_receiver_that_is_half_open_is_left_when_the_run_is_over(tmp_path):
    growing = Growing("prefix", tmp_path / "t")
    began = time.monotonic()
    with half_open() as url:
        done = streamed(tmp_path / "t", url, growing.write, give_time=lambda: 1.0)
    assert time.monotonic() - began < 60  # the exporter itself would wait longer
    assert (0, 863) == (done.delivered.sent, done.delivered.dropped)


def test_a_receiver_that_comes_back_gets_the_rest(tmp_path):
    growing, inbox = Growing("mixed", tmp_path / "t"), Inbox()
    inbox.refusals = 1
    with http_receiver(inbox) as url:
        done = streamed(tmp_path / "t", f"{url}/v1/traces", growing.write)
    assert 0 == done.delivered.dropped and len(inbox.headers) == len(inbox.requests) + 1
    assert golden("mixed") == Counter(span.span_id for span, _ in inbox.spans)


def test_a_truncated_trace_is_sent_as_far_as_it_goes(tmp_path):
    growing, inbox = Growing("prefix", tmp_path / "t"), Inbox()

    def write():
        for number, batch in enumerate(growing.file.batches()):
            if number < 5:
                growing.writer.write(batch)

    with grpc_receiver(inbox) as url:
        streamed(tmp_path / "t", url, write)
    roots = [span for span, _ in inbox.spans if span.name == "llm_request"]
    assert 100 == len(roots)
    growing.writer.close({})
    marked = [one for one in roots if "trace_ended" in [event.name for event in one.events]]
    assert marked


# The process beside -----------------------------------------------------------------------


def test_the_sidecar_tells_what_it_did(tmp_path):
    inbox = Inbox()
    with grpc_receiver(inbox) as url:
        beside = sidecar.start(tmp_path / "t", url)
        Growing("prefix", tmp_path / "t").write()
        told = beside.finish()
    assert (863, 0, 100, "") == (told.spans, told.dropped, told.requests, told.error)
    assert f"863 spans of 100 requests to {url}" == told.text(tmp_path)
    assert golden("prefix") == Counter(span.span_id for span, _ in inbox.spans)


def test_the_sidecar_tells_what_was_lost_and_how_to_get_it(tmp_path, nobody):
    beside = sidecar.start(tmp_path / "t", nobody)
    Growing("hello", tmp_path / "t").write()
    told = beside.finish()
    assert told.failed and (0, 148) == (told.spans, told.dropped)
    assert f"vllm-trace export {tmp_path} --to otlp -o {nobody}" in told.text(tmp_path)


def test_a_sidecar_that_is_killed_is_told_of(tmp_path, nobody):
    beside = sidecar.start(tmp_path / "t", nobody)
    beside.process.kill()
    told = beside.finish()
    assert told.failed and "told nothing" in told.text(tmp_path)


def test_record_sends_and_keeps_the_commands_exit_code(tmp_path, nobody):
    script = "import sys; sys.exit(int(sys.argv[1]))"
    for code in (0, 7):
        done = run_cli(
            "record", "--otlp", "http://127.0.0.1:1", "-o", f"made{code}", "--",
            sys.executable, "-c", script, str(code), cwd=tmp_path,
        )  # fmt: skip
        assert code == done.returncode, done.stderr
        assert "0 spans of 0 requests to http://127.0.0.1:1" in done.stderr


def test_a_url_that_is_none_is_refused_before_anything_runs(tmp_path):
    done = run_cli("record", "--otlp", "localhost", "--", "true", cwd=tmp_path)
    assert 2 == done.returncode and "is no receiver" in done.stderr
    assert [] == list(tmp_path.iterdir())
    with pytest.raises(UsageError):
        sidecar.check("nowhere")


def test_export_follows_by_hand_until_the_writers_are_gone(tmp_path):
    Growing("hello", tmp_path / "t").write()
    inbox = Inbox()
    with grpc_receiver(inbox) as url:
        done = run_cli(
            "export", tmp_path / "t", "--to", "otlp", "-o", url, "--follow", cwd=tmp_path
        )
    assert 0 == done.returncode, done.stderr
    assert f"vllm-trace: 148 spans of 1 request to {url}\n" == done.stderr


def test_ctrl_c_ends_the_following_and_what_was_read_is_sent(tmp_path):
    growing, inbox = Growing("hello", tmp_path / "t"), Inbox()
    batches = list(growing.file.batches())
    with open(growing.writer.path, "rb"), grpc_receiver(inbox) as url:
        live = TraceWriter(tmp_path / f"main-9{SUFFIX}", HEADER | {"role": "main"})
        for batch in batches[:-3]:
            live.write(batch)
        process = subprocess.Popen(
            command("export", tmp_path, "--to", "otlp", "-o", url, "--follow"),
            stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        deadline = time.monotonic() + 60
        while not inbox.requests and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    live.close({})
    growing.writer.close({})
    assert 0 == process.returncode and "spans of 1 request to" in said
    assert "llm_request" in {span.name for span, _ in inbox.spans}


def test_only_spans_can_be_followed(tmp_path):
    done = run_cli("export", tmp_path, "--to", "jaeger-json", "--follow", cwd=tmp_path)
    assert 2 == done.returncode and "only spans are sent" in done.stderr


def test_one_sidecar_is_started_for_a_run_of_many_processes(tmp_path, monkeypatch):
    started = []

    class Started:
        def __init__(self, *args, **more):
            started.append(args)
            self.pid = os.getpid() if len(started) < 2 else 7

    gone = subprocess_that_ended()
    monkeypatch.setattr(subprocess, "Popen", Started)
    assert sidecar.start_alone(tmp_path / "t", "http://127.0.0.1:4317")
    assert not sidecar.start_alone(tmp_path / "t", "http://127.0.0.1:4317")
    assert 1 == len(started)
    # The next run into the same folder: that sidecar is gone.
    (tmp_path / "t" / sidecar.LOCK).write_text(str(gone))
    assert sidecar.start_alone(tmp_path / "t", "http://127.0.0.1:4317")
    assert 2 == len(started)


def test_the_streams_last_words_are_json(tmp_path, nobody):
    Growing("hello", tmp_path / "t").write()
    done = run_cli(
        "export", tmp_path / "t", "--to", "otlp", "-o", nobody, "--follow", "--json",
        cwd=tmp_path,
    )  # fmt: skip
    assert 1 == done.returncode
    told = json.loads(done.stdout)["streamed"]
    assert (0, 148, 1) == (told["spans"], told["dropped"], told["requests"])
    with contextlib.suppress(KeyError):
        assert told["problems"] == []

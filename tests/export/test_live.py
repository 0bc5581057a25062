"""The real engine: ``run`` and ``record -- vllm serve`` send every request's tree while they run."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from helpers import run_cli
from server import Server, clients

from export.receiver import Inbox, assert_trees, grpc_receiver, http_receiver, values
from vllm_trace.export import attributes as a
from vllm_trace.export.spans import SpanFold, spans
from vllm_trace.runner import quiet_environment
from vllm_trace.summary import Summary
from vllm_trace.trace import read_trace

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def assert_told(inbox: Inbox, trace: Path, remote: tuple[bytes, ...] = ()) -> dict[str, dict]:
    """What arrived is what the trace says. Returns the facts of each request's root."""
    ours = [span for span, facts in inbox.spans if "telemetry.distro.name" in facts]
    assert_trees(ours, remote)
    exported = Counter(span.span_id for span in spans(read_trace(trace), SpanFold()))
    assert exported == Counter(span.span_id for span in ours)
    summary = Summary.of(read_trace(trace))
    assert [] == summary.problems
    roots = {
        values(span.attributes)[a.REQUEST_ID]: span for span in ours if span.name == "llm_request"
    }
    assert {life.name for life in summary.requests} == set(roots)
    for life in summary.requests:
        facts = values(roots[life.name].attributes)
        assert (
            life.num_prompt_tokens, life.num_output_tokens, life.num_hit_tokens, life.num_steps,
            [life.reason],
        ) == (
            facts[a.INPUT_TOKENS], facts[a.OUTPUT_TOKENS], facts.get(a.CACHE_READ, 0),
            facts[a.NUM_STEPS], facts[a.FINISH_REASONS],
        )  # fmt: skip
        names = {span.name for span in ours if span.trace_id == roots[life.name].trace_id}
        whole = {"queued", "schedule", "prefix_lookup", "allocate", "prefill", "free"}
        assert whole <= names
        assert a.INCOMPLETE not in facts
    steps = [span for span in ours if span.name == "engine_step"]
    assert len(summary.steps) == len(steps)
    return {name: values(root.attributes) for name, root in roots.items()}


def test_run_prefix_sends_every_tree_whole(tmp_path):
    inbox = Inbox()
    with grpc_receiver(inbox) as url:
        done = run_cli(
            "run", "prefix", "--otlp", url, "--json", "-o", "made", cwd=tmp_path,
            env=quiet_environment(),
        )  # fmt: skip
    assert 0 == done.returncode, done.stderr
    document = json.loads(done.stdout)
    told = document["otlp"]
    assert (len(inbox.spans), 0, 100) == (told["spans"], told["dropped"], told["requests"])
    assert f"vllm-trace: {told['spans']} spans of 100 requests to {url}\n" == done.stderr
    facts = assert_told(inbox, tmp_path / "made")
    assert document["facts"]["hit_tokens"] == sum(one[a.CACHE_READ] for one in facts.values())


def test_a_receiver_that_is_gone_leaves_the_run_as_it_is(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    done = run_cli(
        "run", "hello", "--otlp", url, "-o", "made", cwd=tmp_path,
        env=quiet_environment() | {"OTEL_EXPORTER_OTLP_TIMEOUT": "1"},
    )  # fmt: skip
    assert 1 == done.returncode
    assert "Shown as stated" in done.stdout
    assert "148 were not delivered" in done.stderr and "They are in the trace" in done.stderr
    assert [] == Summary.of(read_trace(tmp_path / "made")).problems


OWN = """
    import os
    from vllm_trace import runner, scenario

    llm, _ = runner.start_engine(scenario.load("hello"))
    runner.run_workload(llm, scenario.load("hello"))
    runner.stop_engine(llm)
"""


def test_a_program_of_ones_own_sends_by_the_variable(tmp_path):
    import textwrap

    (tmp_path / "own.py").write_text(textwrap.dedent(OWN))
    inbox = Inbox()
    with http_receiver(inbox) as url:
        environ = os.environ | quiet_environment()
        environ |= {"VTRACE_DIR": str(tmp_path / "t"), "VTRACE_OTLP": f"{url}/v1/traces"}
        done = subprocess.run(
            [sys.executable, "own.py"], cwd=tmp_path, env=environ, stderr=subprocess.DEVNULL
        )
        assert 0 == done.returncode
        expected = sum(1 for _ in spans(read_trace(tmp_path / "t")))
        deadline = time.monotonic() + 60
        while len(inbox.spans) < expected and time.monotonic() < deadline:
            time.sleep(0.1)
    assert 1 == len(assert_told(inbox, tmp_path / "t"))


# A server ---------------------------------------------------------------------------------

NUM_CLIENTS = 12


def client_span(number: int) -> str:
    return f"00-{0xABC000 + number:032x}-{0xDEF000 + number:016x}-01"


async def _ask(server: Server) -> list[tuple[str, int, int]]:
    async with clients() as session:
        await server.ready(session)

        def complete(number: int) -> Coroutine[Any, Any, tuple[str, int, int]]:
            prompt = f"{number % 3}: what is " + "paging " * 20
            # The last one comes without a trace of its own.
            headers = {"traceparent": client_span(number)} if number < NUM_CLIENTS - 1 else None
            return server.complete(session, prompt, 4 + number, headers)

        return await asyncio.gather(*map(complete, range(NUM_CLIENTS)))


def test_record_of_a_server_continues_its_clients_traces(tmp_path):
    """vLLM drops ``traceparent`` unless its own tracing is on: ``--otlp-traces-endpoint``."""
    inbox = Inbox()
    with grpc_receiver(inbox) as url:
        server = Server(tmp_path, record=["--otlp", url], serve=["--otlp-traces-endpoint", url])
        try:
            answers = asyncio.run(_ask(server))
            server.process.send_signal(signal.SIGINT)
            code = server.process.wait(timeout=120)
        finally:
            server.kill()
    assert 0 == code, server.log
    assert f"spans of {NUM_CLIENTS} requests to {url}\n" in server.log

    parents = {client_span(number)[36:52]: number for number in range(NUM_CLIENTS)}
    remote = tuple(bytes.fromhex(parent) for parent in parents)
    facts = assert_told(inbox, tmp_path / "made", remote)
    ours = [span for span, facts in inbox.spans if "telemetry.distro.name" in facts]
    roots = [span for span in ours if span.name == "llm_request"]
    continued = [span for span in roots if span.parent_span_id]
    assert NUM_CLIENTS - 1 == len(continued)
    for root in continued:
        number = parents[root.parent_span_id.hex()]
        assert client_span(number)[3:35] == root.trace_id.hex()
        told = values(root.attributes)
        assert 4 + number == told[a.OUTPUT_TOKENS]
        assert told[a.REQUEST_ID].startswith(answers[number][0])
    assert NUM_CLIENTS == len(facts)
    # vLLM's own span of a request stands beside ours, under the same span of the client.
    theirs = [
        span for span, facts in inbox.spans
        if "telemetry.distro.name" not in facts and span.name == "llm_request"
    ]  # fmt: skip
    assert {span.trace_id for span in continued} <= {span.trace_id for span in theirs}
    # Both processes told of the steps.
    roles = {
        (span.name, facts["vllm_trace.role"]) for span, facts in inbox.spans
        if "telemetry.distro.name" in facts
    }  # fmt: skip
    assert {("schedule", "engine"), ("execute", "worker"), ("attention", "worker")} <= roles

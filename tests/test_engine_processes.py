"""vLLM in several processes: EngineCore of its own, two workers, a server, and processes that die."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from helpers import command, ran, run_cli
from server import Server, clients

from vllm_trace.events import (
    RequestArrived,
    RequestFinished,
    SlotsMapped,
    StepExecuted,
    StepScheduled,
    StepUpdated,
)
from vllm_trace.runner import quiet_environment
from vllm_trace.state import KVState
from vllm_trace.summary import Summary
from vllm_trace.trace import Trace, read_trace
from vllm_trace.tracefile import TAIL_SUFFIX

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def roles(trace: Trace) -> list[str]:
    return sorted(file.header["role"] for file in trace.files)


def assert_whole(trace: Trace) -> Summary:
    """No event lost, no file cut short, and every worker received what the manager gave."""
    summary = Summary.of(trace)
    assert [] == trace.problems
    assert [(0, "")] * len(trace.files) == [(f.dropped, f.truncated) for f in trace.files]
    assert all(file.footer for file in trace.files)
    assert [] == list(trace.files[0].path.parent.glob(f"*{TAIL_SUFFIX}"))
    assert "" == summary.worker.first_difference
    planned, mapped = (
        {event.step for event in trace.events() if isinstance(event, kind)}
        for kind in (StepScheduled, SlotsMapped)
    )
    # An engine that was stopped within a step wrote nothing of it; a worker that had its plan may have.
    cut = any("ended" in file.footer for file in trace.files)
    assert mapped - planned <= ({max(planned) + 1} if cut else set())
    assert (summary.worker.num_unplanned == 0) == (mapped <= planned)
    return summary


# EngineCore in its own process ------------------------------------------------------------


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    """``run`` of two scenarios, side by side, with EngineCore in its own process."""
    folder = tmp_path_factory.mktemp("apart")
    environ = os.environ | quiet_environment() | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    started = {
        name: subprocess.Popen(
            command("run", name, "--tokens", "--json", "-o", folder / name),
            env=environ, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for name in ("preempt", "prefix")
    }  # fmt: skip
    yield {name: (folder / name, process) for name, process in started.items()}
    for process in started.values():
        process.kill()


@pytest.mark.parametrize("name", ["preempt", "prefix"])
def test_identical_with_enginecore_in_its_own_process(name, apart):
    folder, process = apart[name]
    out, err = process.communicate(timeout=300)
    assert (0, "") == (process.returncode, err)
    document = json.loads(out)
    assert [] == document["failures"]

    trace = read_trace(folder)
    assert ["engine", "worker"] == roles(trace)
    summary = assert_whole(trace)
    alone = ran(name, "full")
    state, steps, running = KVState(), [], {}
    executed: list[int] = []
    answers: dict[str, list[int]] = {}
    for event in trace.events():
        state.apply(event)
        if isinstance(event, StepScheduled) and event.requests:
            called = running[event.step] = [trace.names[request] for request in event.requests]
            tables = {trace.names[r]: [list(g) for g in t] for r, t in state.tables.items()}
            steps.append((list(zip(called, event.num_tokens, strict=True)), tables))
        if isinstance(event, StepExecuted) and event.num_tokens:
            executed.append(event.step)
        if isinstance(event, StepUpdated) and event.step in running:
            for request, ids in zip(running[event.step], event.token_ids, strict=True):
                answers.setdefault(request, []).extend(ids)
    assert [(step.composition, step.tables) for step in alone.steps] == steps
    assert alone.outcome.token_ids == {name: [tuple(ids)] for name, ids in answers.items()}
    # The worker's steps carry the scheduler's numbers.
    assert list(running) == executed
    assert sum(len(step.tokens) for step in alone.steps) == summary.worker.num_rows


def test_hello_on_two_workers(tmp_path):
    done = run_cli(
        "run", "hello", "-o", "made", "--engine-arg", "tensor_parallel_size=2",
        cwd=tmp_path, env=quiet_environment(),
    )  # fmt: skip
    assert (0, "") == (done.returncode, done.stderr)
    trace = read_trace(tmp_path / "made")
    assert ["main", "worker", "worker"] == roles(trace)
    summary = assert_whole(trace)
    assert 2 == summary.num_workers
    told = " ".join(done.stdout.split())
    assert "2 workers: 40 table rows and 50 slots as the kernels received them, all equal" in told
    assert "CPU_ATTN for 2 layers" in told  # each worker tells of the same two

    received: dict[int, list[tuple[int, list[int]]]] = {}
    ranks = set()
    for record in trace.records():
        event = record.event
        if isinstance(event, SlotsMapped):
            received.setdefault(record.process, []).append((event.step, event.slots))
        if isinstance(event, StepExecuted):
            ranks.add(event.rank)
    assert {0, 1} == ranks
    first, second = received.values()
    assert first == second
    # One block of 32 tokens, block 1, from its first slot on.
    assert list(range(32, 57)) == [slot for _, slots in first for slot in slots]


# A server ---------------------------------------------------------------------------------

NUM_CLIENTS = 200


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """Two, started at the same time: one is stopped by Ctrl-C, one by SIGTERM under load."""
    folder = tmp_path_factory.mktemp("serve")
    started = [Server(folder / "calm"), Server(folder / "busy")]
    yield started
    for server in started:
        server.kill()


@pytest.fixture
def following(servers):
    one = Following(servers[0].folder / "made")
    yield one
    if one.process is not None:
        one.process.kill()


def test_a_server_with_200_clients_until_ctrl_c(servers, following):
    server = servers[0]

    async def served() -> list[tuple[str, int, int]]:
        async with clients() as session:
            await server.ready(session)
            following.start()
            await following.looked()
            answers = await asyncio.gather(
                *(
                    server.complete(session, f"{i}: what is " + "paging " * (i % 7), 8 + i % 20)
                    for i in range(NUM_CLIENTS)
                )
            )
            # They may all be served between two looks: then one more runs until it was looked at.
            while not following.saw_it_run():
                answers.append(await server.complete(session, "once more", 900))
            return answers

    answers = asyncio.run(served())
    server.process.send_signal(signal.SIGINT)
    assert 0 == server.process.wait(timeout=60), server.log
    assert f"vllm-trace: {len(answers)} requests, " in server.log

    trace = read_trace(server.folder / "made")
    assert ["engine", "worker"] == roles(trace)
    summary = assert_whole(trace)
    lives = {life.name: life for life in summary.requests}
    assert len(answers) == len(lives) >= NUM_CLIENTS
    for request_id, num_prompt_tokens, num_output_tokens in answers:
        (life,) = [life for name, life in lives.items() if name.startswith(request_id)]
        assert (num_prompt_tokens, num_output_tokens, "length") == (
            life.num_prompt_tokens,
            life.num_output_tokens,
            life.reason,
        )
        assert 0 < life.arrived_ns < life.first_scheduled_ns < life.finished_ns
    events = list(trace.events())
    assert len(answers) == sum(isinstance(event, RequestArrived) for event in events)
    assert len(answers) == sum(isinstance(event, RequestFinished) for event in events)
    numbered = [event.step for event in events if isinstance(event, StepScheduled)]
    assert list(range(1, len(numbered) + 1)) == numbered
    assert max(step.num_running for step in summary.steps) > 1  # they were there together
    assert 0 == summary.facts()["blocks_in_use_at_end"]
    assert_was_followed(following, summary)


class Following:
    """``show --follow --json`` of a server, and the looks that it has had so far."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.looks: list[dict[str, Any]] = []
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(
            command("show", self.folder, "--follow", "--json"), stdout=subprocess.PIPE, text=True
        )
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.looks.append(json.loads(line))

    async def looked(self) -> None:
        """Wait for the first look: from then on it follows."""
        while not self.looks:
            assert self.process.poll() is None
            await asyncio.sleep(0.05)

    def busy(self) -> list[dict[str, Any]]:
        """The engine in each look at which requests ran."""
        engines = [look["engines"][0] for look in self.looks if look["engines"]]
        return [engine for engine in engines if engine["running"]]

    def saw_it_run(self) -> bool:
        """Whether a look fell into the time in which it ran, with a rate."""
        return any(
            engine["steps_per_s"] > 1 and engine["tokens_per_s"] > 1 for engine in self.busy()
        )

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)
        assert 0 == self.process.wait(timeout=60)
        self.reader.join(timeout=60)


def assert_was_followed(following: Following, summary: Summary) -> None:
    """``show --follow`` saw it run: a rate, owners of blocks, and at the end every event once."""
    following.stop()
    assert following.saw_it_run()
    for engine in following.busy():
        held = sum(owner not in (-2, -1) for owner in engine["owners"])
        assert engine["blocks"] - engine["free_blocks"] == held > 0
    last = following.looks[-1]
    assert (summary.num_events, True, "") == (last["events"], last["ended"], last["problem"])
    (engine,) = last["engines"]
    assert (len(summary.requests), 0, engine["blocks"]) == (
        engine["finished"], engine["running"], engine["free_blocks"],
    )  # fmt: skip


async def arrivals(folder: Path, number: int) -> None:
    """Wait until the trace, which is still written, has so many requests."""
    while sum(isinstance(event, RequestArrived) for event in read_trace(folder).events()) < number:
        await asyncio.sleep(0.1)


def test_a_server_that_is_terminated_under_load(servers):
    server = servers[1]

    async def load() -> int:
        async with clients() as session:
            await server.ready(session)
            begun = [
                asyncio.create_task(server.complete(session, f"request {i}", 900))
                for i in range(20)
            ]
            await server.complete(session, "short", 4)
            await arrivals(server.folder / "made", 21)
            server.process.send_signal(signal.SIGTERM)
            # vLLM waits for its clients, traced or not; these are not patient.
            for one in begun:
                one.cancel()
            await asyncio.gather(*begun, return_exceptions=True)
            return await asyncio.to_thread(server.process.wait, 60)

    code = asyncio.run(load())
    # What vLLM makes of SIGTERM: a clean end, or death by the signal. Not ours (1 and 2 would be).
    assert code in (0, 128 + signal.SIGTERM), server.log
    trace = read_trace(server.folder / "made")
    summary = assert_whole(trace)
    assert 21 == len(summary.requests)
    assert 1 <= sum(life.reason == "length" for life in summary.requests)


# Death ------------------------------------------------------------------------------------

ENDLESS = """
    import os

    from vllm_trace import runner, scenario

    llm, _ = runner.start_engine(scenario.load("preempt"))
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
    print("pid", os.getpid(), flush=True)
    number = 0
    while True:
        if not llm.llm_engine.has_unfinished_requests():
            number += 1
            llm.llm_engine.add_request(f"r-{number}", {"prompt_token_ids": [5] * 20}, params)
        llm.llm_engine.step()
        print("step", flush=True)
"""


@pytest.mark.parametrize("level", ["light", "full"])
def test_kill_9_in_mid_run_loses_at_most_the_last_step(tmp_path, level):
    (tmp_path / "endless.py").write_text(textwrap.dedent(ENDLESS))
    process = subprocess.Popen(
        command("record", "--level", level, "-o", "made", "--", sys.executable, "endless.py"),
        cwd=tmp_path,
        env=os.environ | quiet_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    steps = 0
    for line in process.stdout:
        if line.startswith("pid"):
            pid = int(line.split()[1])
        steps += line == "step\n"
        if steps == 60:
            os.kill(pid, signal.SIGKILL)
            break
    rest = process.stdout.read()
    said = process.stderr.read()
    assert 128 + signal.SIGKILL == process.wait(timeout=60)
    steps += rest.count("step\n")

    trace = read_trace(tmp_path / "made")
    updated = [event.step for event in trace.events() if isinstance(event, StepUpdated)]
    (file,) = trace.files
    assert "the process was killed" == file.truncated
    assert 0 == file.dropped
    # Every step that the script saw the end of, and at most one more, from the first on.
    assert list(range(1, len(updated) + 1)) == updated
    assert len(updated) in (steps, steps + 1)
    assert "truncated (the process was killed)" in said
    assert "truncated (the process was killed)" in run_cli("show", "made", cwd=tmp_path).stdout


def test_record_forwards_what_it_cannot_trace(tmp_path):
    """A command that has nothing to do with vLLM: its output and exit code are its own."""
    script = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(7)"
    done = run_cli("record", "--", sys.executable, "-c", script, cwd=tmp_path)
    assert (7, "out\n") == (done.returncode, done.stdout)
    assert done.stderr.startswith("err\nvllm-trace: no vLLM process of that command wrote a trace")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_record_hands_signals_to_its_command(tmp_path, number):
    script = (
        "import signal, sys, time\n"
        f"signal.signal({int(number)}, lambda *_: sys.exit(3))\n"
        "print('up', flush=True)\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen(
        command("record", "-o", "made", "--", sys.executable, "-c", script),
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert "up\n" == process.stdout.readline()
    process.send_signal(number)
    assert 3 == process.wait(timeout=30)  # it did not sleep to the end

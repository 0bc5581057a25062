"""Processes that fork, end without a word, are killed or have a full disk: what their files hold."""

import signal
import subprocess
import sys

import pytest
from fakes.files import files_of

from vllm_trace.events import RequestFreed, RequestSeen


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "trace"


PROLOGUE = """
import multiprocessing, os, signal, sys, time
from vllm_trace.events import RequestFreed
from vllm_trace.options import Options
from vllm_trace.recorder import Recorder

def free(recorder, *numbers):
    for number in numbers:
        recorder.append(RequestFreed(number))
"""


def run(tmp_path, code, folder, wait=True):
    script = tmp_path / "script.py"
    script.write_text(PROLOGUE + code)
    process = subprocess.Popen(
        [sys.executable, str(script), str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A suite that runs in the background of a shell has its children ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    if not wait:
        return process
    out, err = process.communicate(timeout=60)
    assert 0 == process.returncode, err
    return out, err


def test_a_process_that_ends_without_closing_leaves_a_whole_file(tmp_path, folder):
    run(tmp_path, "recorder = Recorder(Options(dir=sys.argv[1]))\nfree(recorder, 1, 2)", folder)
    ((events, file),) = files_of(folder).values()
    assert ([RequestFreed(1), RequestFreed(2)], "") == (events, file.truncated)


FORKS = """
recorder = Recorder(Options(dir=sys.argv[1]))
recorder.arrive("before the fork")
free(recorder, 1)
recorder.flush()
free(recorder, 2)
child = os.fork()
if child == 0:
    recorder.append(RequestFreed(recorder.numbers["before the fork"]))
    recorder.flush()
    sys.exit()
os.waitpid(child, 0)
idle = os.fork()
if idle == 0:
    sys.exit()
os.waitpid(idle, 0)
free(recorder, 3)
print(os.getpid(), child, idle)
"""


def test_a_forked_child_has_a_file_of_its_own_when_it_has_something_to_say(tmp_path, folder):
    out, err = run(tmp_path, FORKS, folder)
    parent, child, _ = out.split()
    files = files_of(folder)
    assert {f"main-{parent}.vtrace", f"main-{child}.vtrace"} == set(files)
    events, file = files[f"main-{parent}.vtrace"]
    assert [RequestFreed(1), RequestFreed(2), RequestFreed(3)] == events
    assert ("", int(parent)) == (file.truncated, file.header["pid"])
    (seen, freed), file = files[f"main-{child}.vtrace"]
    assert (RequestSeen(seen.request, "before the fork"), RequestFreed(seen.request)) == (
        seen,
        freed,
    )
    assert ("", int(child)) == (file.truncated, file.header["pid"])
    assert "" == err


CHILDREN = """
def child(folder, number):
    recorder = Recorder(Options(dir=folder))
    free(recorder, number)

def inheriting(recorder, number):
    free(recorder, number)

if __name__ == "__main__":
    for number, method in enumerate(("spawn", "fork")):
        context = multiprocessing.get_context(method)
        process = context.Process(target=child, args=(sys.argv[1], number), name="EngineCore")
        process.start()
        process.join()
    recorder = Recorder(Options(dir=sys.argv[1]))
    process = multiprocessing.get_context("fork").Process(target=inheriting, args=(recorder, 2), name="Worker")
    process.start()
    process.join()
"""


def test_a_child_of_multiprocessing_leaves_a_whole_file_though_it_ends_by_os_exit(tmp_path, folder):
    run(tmp_path, CHILDREN, folder)
    read = files_of(folder).values()
    assert [[RequestFreed(n)] for n in range(3)] == sorted(
        ([*events] for events, _ in read), key=lambda events: events[0].request
    )
    assert {""} == {file.truncated for _, file in read}
    assert ["engine", "engine", "worker"] == sorted(file.header["role"] for _, file in read)


SERVES = """
recorder = Recorder(Options(dir=sys.argv[1]))
def stop(*_):
    raise SystemExit(0)
if HANDLED:
    signal.signal(signal.SIGTERM, stop)  # as vLLM's EngineCore does
free(recorder, 1)
recorder.flush()
free(recorder, 2)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("handled", [True, False], ids=["with vLLM's handler", "without a handler"])
def test_sigterm_leaves_a_whole_file_or_one_that_reads_to_the_last_step(tmp_path, folder, handled):
    process = run(tmp_path, SERVES.replace("HANDLED", str(handled)), folder, wait=False)
    assert "ready\n" == process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    ((events, file),) = files_of(folder).values()
    assert (0 if handled else -signal.SIGTERM) == process.returncode
    assert ([RequestFreed(1), RequestFreed(2)] if handled else [RequestFreed(1)]) == events
    assert handled == (file.truncated == "")


def test_ctrl_c_leaves_a_whole_file(tmp_path, folder):
    process = run(tmp_path, SERVES.replace("HANDLED", "False"), folder, wait=False)
    assert "ready\n" == process.stdout.readline()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    ((events, file),) = files_of(folder).values()
    assert ([RequestFreed(1), RequestFreed(2)], "") == (events, file.truncated)


FULL_DISK = """
import resource
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, 700_000))
recorder = Recorder(Options(dir=sys.argv[1]))
import random
for step in range(3000):
    free(recorder, *(random.getrandbits(60) for _ in range(100)))
    recorder.flush()
print("the engine is done")
"""


def test_on_a_full_disk_the_engine_goes_on_and_both_it_and_the_trace_say_so(tmp_path, folder):
    out, err = run(tmp_path, FULL_DISK, folder)
    assert "the engine is done\n" == out
    assert (
        "vllm-trace: the trace cannot be written on (File too large); "
        "the engine goes on, events from here on are counted and dropped\n" == err
    )
    ((events, file),) = files_of(folder).values()
    assert 300_000 == len(events) + file.dropped
    assert len(events) > 0 < file.dropped
    assert "could not be written on: File too large" == file.truncated

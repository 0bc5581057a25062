"""What was written is what is read: whole, beside its writer, killed at any point, or on a full disk."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from fakes.events import as_read, batches
from fakes.files import HEADER, SMALL_TAIL, read, tail_of, taken, write
from hypothesis import given
from hypothesis import strategies as st

from vllm_trace.events import BlocksTaken, SlotsAllocated, SlotsRefused, StepScheduled
from vllm_trace.tracefile import TraceFile
from vllm_trace.tracewriter import TraceWriter

# Whole files ------------------------------------------------------------------------------


@given(st.lists(st.booleans(), min_size=1, max_size=12), st.booleans())
def test_silent_calls_are_counted_from_the_composition_when_they_were_not_noted(silent, refused):
    """A request of the step is silent or gets a block; who is refused is in no step and comes last."""
    counted, plain, num_silent = [], [], 0
    for request, is_silent in enumerate(silent):
        num_silent += is_silent
        if not is_silent:
            counted.append(SlotsAllocated(request, 1, 0, [[request + 7]], [], 99, num_silent))
            plain.append(SlotsAllocated(request, 1, 0, [[request + 7]], [], 99, -1))
    if refused:
        counted.append(SlotsRefused(50, 1, 0, 99, num_silent))
        plain.append(SlotsRefused(50, 1, 0, 99, -1))
    requests = [*range(len(silent))]
    for events, kept in (counted, num_silent), (plain, -1):
        events.append(StepScheduled(1, 5, 5, 9, 9, 9, kept, requests, [1] * len(requests)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "main-1.vtrace"
        write(path, [plain])
        assert counted == read(path)[0]


@given(batches, st.sampled_from([256, SMALL_TAIL, 1 << 16]), st.booleans())
def test_arbitrary_events_in_arbitrary_batches_are_read_as_they_were_written(
    some, tail_size, close
):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "main-1.vtrace"
        expected = as_read(some)  # before the write: a reader must not depend on our objects
        writer = write(path, some, tail_size, close)
        actual, file = read(path)
        assert expected == actual
        assert (len(expected), len(expected)) == (writer.num_events, file.num_events)
        assert HEADER == file.header
        assert ("", 0) == (file.truncated, file.dropped) if close else file.truncated


def test_batches_keep_their_bounds_and_the_file_can_be_read_again(tmp_path):
    path = tmp_path / "a.vtrace"
    some = [taken(1, 2), taken(3), taken(4, 5, 6)]
    write(path, some)
    file = TraceFile(path)
    assert some == list(file.batches())
    assert some == list(file.batches())
    assert 6 == file.num_events


def test_a_closed_file_stands_alone_and_counts_itself(tmp_path):
    path = tmp_path / "a.vtrace"
    writer = write(path, [taken(*range(100)) for _ in range(20)])
    assert ["a.vtrace"] == os.listdir(tmp_path)
    file = TraceFile(path).finish()
    assert 2000 == file.num_events == file.footer["num_events"] == writer.num_events
    assert file.footer["num_frames"] > 1
    size = path.stat().st_size
    writer.close({})
    assert size == path.stat().st_size, "closing twice is closing once"


def test_a_batch_larger_than_the_tail_keeps_its_place(tmp_path):
    path = tmp_path / "a.vtrace"
    large = taken(*range(5000))
    some = [taken(-1), large, taken(-2), large, large, taken(-3)]
    write(path, some)
    assert some == list(TraceFile(path).batches())


def test_a_full_tail_becomes_a_frame_and_nothing_is_lost_in_between(tmp_path):
    path = tmp_path / "a.vtrace"
    writer = TraceWriter(path, HEADER, SMALL_TAIL)
    sizes = [path.stat().st_size]
    for number in range(400):
        writer.write(taken(number))
        sizes.append(path.stat().st_size)
        if number % 97 == 0:
            assert taken(*range(number + 1)) == read(path)[0]
    assert len(set(sizes)) > 3, "no frame was written"
    writer.close({})
    assert taken(*range(400)) == read(path)[0]


def test_two_writers_do_not_share_a_file(tmp_path):
    path = tmp_path / "a.vtrace"
    writer = write(path, [taken(1)], close=False)
    with pytest.raises(FileExistsError):
        TraceWriter(path, HEADER)
    writer.close({})
    assert taken(1) == read(path)[0]


# Without an end ---------------------------------------------------------------------------


def test_a_file_that_is_still_written_reads_up_to_the_last_write(tmp_path):
    path = tmp_path / "a.vtrace"
    writer = TraceWriter(path, HEADER)
    seen = []
    for number in range(5):
        writer.write(taken(number))
        actual, file = read(path)
        seen.append(actual)
        assert "no footer" in file.truncated
        assert {} == file.footer
    assert [taken(*range(n + 1)) for n in range(5)] == seen
    writer.close({})
    assert "" == TraceFile(path).finish().truncated


CHILD = """
import sys
from pathlib import Path
from vllm_trace.events import BlocksTaken
from vllm_trace.tracewriter import TraceWriter
writer = TraceWriter(Path(sys.argv[1]), {"schema": 1}, tail_size=4096)
for number in range(10**9):
    writer.write([BlocksTaken([number]), BlocksTaken([-number])])
    sys.stdout.write(f"{number}\\n")
    sys.stdout.flush()
"""


@pytest.mark.parametrize("progress", [1, 60, 700, 3000])
def test_kill_9_loses_at_most_the_batch_that_was_being_written(tmp_path, progress):
    path = tmp_path / "a.vtrace"
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path)], stdout=subprocess.PIPE, text=True
    )
    for _ in range(progress):
        child.stdout.readline()
    child.send_signal(signal.SIGKILL)
    rest = child.stdout.read().splitlines()
    assert -signal.SIGKILL == child.wait()
    reported = progress + len([line for line in rest if line])
    actual, file = read(path)
    every = [BlocksTaken([n * sign]) for n in range(reported + 1) for sign in (1, -1)]
    assert actual in (every[: 2 * reported], every[: 2 * reported + 2]), len(actual)
    assert "killed" in file.truncated


def test_a_frame_that_was_written_before_its_tail_was_emptied_is_not_read_twice(tmp_path):
    """Killed between the two: the old tail is still there, of an older generation."""
    path = tmp_path / "a.vtrace"
    writer = TraceWriter(path, HEADER, SMALL_TAIL)
    old_size, number = path.stat().st_size, 0
    while path.stat().st_size == old_size:
        shutil.copy(tail_of(path), tmp_path / "before")
        writer.write(taken(number))
        number += 1
    shutil.copy(
        tmp_path / "before", tail_of(path)
    )  # the write that made the frame never came to its end
    actual, file = read(path)
    assert taken(*range(number - 1)) == actual
    assert file.truncated
    writer.close({})


def test_a_lost_tail_costs_what_was_in_it_and_no_more(tmp_path):
    path = tmp_path / "a.vtrace"
    writer = write(path, [taken(n) for n in range(200)], close=False)
    tail_of(path).rename(tmp_path / "away")
    actual, file = read(path)
    assert taken(*range(len(actual))) == actual
    assert 0 < len(actual) < 200
    assert file.truncated
    (tmp_path / "away").rename(tail_of(path))
    writer.close({})


def test_a_tail_that_was_emptied_while_it_was_read_is_not_believed(tmp_path, monkeypatch):
    """The writer makes a frame between the last look at the file and the look at the tail."""
    path = tmp_path / "a.vtrace"
    writer = TraceWriter(path, HEADER, SMALL_TAIL)
    numbers = iter(range(10**6))
    writer.write(taken(next(numbers)))
    reads = []

    def read_tail(file, original=TraceFile._read_tail):
        size, data = path.stat().st_size, original(file)
        while len(reads) < 3 and path.stat().st_size == size:
            writer.write(taken(next(numbers)))
        reads.append(data)
        return data

    monkeypatch.setattr(TraceFile, "_read_tail", read_tail)
    actual, _ = read(path)
    assert taken(*range(next(numbers))) == actual
    assert 4 == len(reads)
    writer.close({})


def test_a_reader_beside_a_writer_sees_all_that_was_written_before_it_began(tmp_path):
    path = tmp_path / "a.vtrace"
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path)], stdout=subprocess.PIPE, text=True
    )
    try:
        for _ in range(8):
            for _ in range(150):
                reported = int(child.stdout.readline())
            actual, file = read(path)
            every = [BlocksTaken([n * sign]) for n in range(len(actual)) for sign in (1, -1)]
            assert len(actual) > 2 * reported
            assert every[: len(actual)] == actual
            assert "no footer" in file.truncated or "torn" in file.truncated
    finally:
        child.kill()
        child.communicate()


def test_marks_of_a_whole_reading_outlive_one_that_was_broken_off(tmp_path):
    path = tmp_path / "a.vtrace"
    writer = write(path, [taken(n) for n in range(200)], close=False)
    file = TraceFile(path)
    next(file.events())
    assert "" == file.truncated, "nothing is known before the first end"
    file.finish()
    next(file.events())
    assert "no footer" in file.truncated
    writer.close({"dropped": 3})
    file.finish()
    next(file.events())
    assert ("", 3, 200) == (file.truncated, file.dropped, file.footer["num_events"])


def test_a_batch_larger_than_a_reader_takes_is_dropped_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("vllm_trace.tracewriter.MAX_RAW", 4000)
    path = tmp_path / "a.vtrace"
    write(path, [taken(1), taken(*range(2000)), taken(2)])
    actual, file = read(path)
    assert (taken(1, 2), 2000) == (actual, file.dropped)


# Full disks -------------------------------------------------------------------------------

FILLS_THE_DISK = """
import json, signal, sys
from pathlib import Path
from random import Random
from vllm_trace.events import BlocksTaken
from vllm_trace.tracefile import TraceFile
from vllm_trace.tracewriter import TraceWriter
limit = int(sys.argv[2])
if limit:
    import resource
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
random, path = Random(0), Path(sys.argv[1]) / "main-1.vtrace"
writer = TraceWriter(path, {"schema": 1}, tail_size=1 << 16)
for number in range(200):
    writer.write([BlocksTaken([number, *(random.getrandbits(60) for _ in range(1000))])])
failure, dropped = writer.failure, writer.dropped
writer.close({"dropped": dropped})
file = TraceFile(path)
read = [event.blocks[0] for event in file.events()]
print(json.dumps([failure, dropped, writer.num_events, read, file.dropped, file.truncated]))
"""


def fill(folder, *, limit=0, before=()):
    command = [*before, sys.executable, "-c", FILLS_THE_DISK, str(folder), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert 0 == done.returncode, done.stderr
    failure, dropped, num_events, events, read_dropped, truncated = json.loads(done.stdout)
    assert failure
    assert 0 < dropped < 200
    assert list(range(200 - dropped)) == events, (
        "what was written before the disk was full can be read"
    )
    assert (num_events, dropped) == (len(events), read_dropped)
    assert f"could not be written on: {failure}" == truncated
    return failure


def test_a_file_that_may_not_grow_is_read_up_to_there_and_says_what_was_dropped(tmp_path):
    assert "File too large" == fill(tmp_path, limit=600_000)


def test_a_full_disk_is_read_up_to_there_and_says_what_was_dropped(tmp_path):
    mounted = 'mount -t tmpfs -o size=512k tmpfs "$0" && exec "$@"'
    inside = ["unshare", "--mount", "sh", "-c", mounted, str(tmp_path)]
    if (
        not shutil.which("unshare")
        or subprocess.run([*inside, "true"], capture_output=True).returncode
    ):
        pytest.skip("a small disk of our own cannot be mounted here")
    assert "No space left on device" == fill(tmp_path, before=inside)
    assert [] == os.listdir(tmp_path), "the small disk was seen outside"


def test_a_disk_without_room_for_the_tail_is_an_error_at_the_start_and_leaves_nothing(tmp_path):
    code = FILLS_THE_DISK.replace("tail_size=1 << 16", "tail_size=1 << 20")
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), "600000"], capture_output=True, text=True
    )
    assert "OSError: [Errno 27] File too large" in done.stderr
    assert [] == os.listdir(tmp_path)
